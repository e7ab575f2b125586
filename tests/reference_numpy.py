"""RWKV-7 written down a second time, to hold the package against: numpy float64, token by token, head by head.

From the equations of the paper (arXiv 2503.14456) alone; shares no code with `rwkv_stream`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Array = np.ndarray
State = dict[str, Array]  # att_x_prev [L, C], att_kv [L, H, N value, N key], ffn_x_prev [L, C]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def normalised(x: Array, eps: float) -> Array:
    return (x - x.mean()) / np.sqrt(x.var() + eps)


class Reference:
    """weights: official names, vectors of any shape that flattens to C."""

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self.w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.w = {name: value.ravel() if value.shape[:2] == (1, 1) else value for name, value in self.w.items()}
        self.L = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        self.H, self.N = self.w["blocks.0.att.r_k"].shape
        self.C = self.H * self.N

    def zero_state(self) -> State:
        L, C, H, N = self.L, self.C, self.H, self.N
        return {"att_x_prev": np.zeros((L, C)), "att_kv": np.zeros((L, H, N, N)), "ffn_x_prev": np.zeros((L, C))}

    def __call__(self, tokens: Sequence[int], state: State | None = None) -> tuple[Array, Array, State]:
        """Hidden states [T, C] after ln_out, logits [T, V], new state."""
        state = {name: part.copy() for name, part in (state or self.zero_state()).items()}
        hidden = np.array([self._token(token, state) for token in tokens])
        return hidden, hidden @ self.w["head.weight"].T, state

    def _layer_norm(self, x: Array, name: str) -> Array:
        return normalised(x, 1e-5) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def _token(self, token: int, state: State) -> Array:
        x = self._layer_norm(self.w["emb.weight"][token], "blocks.0.ln0")
        v_first = np.zeros(0)
        for i in range(self.L):
            h = self._layer_norm(x, f"blocks.{i}.ln1")
            added, v_first = self._time_mix(i, h, state["att_x_prev"][i], state["att_kv"][i], v_first)
            state["att_x_prev"][i] = h
            x = x + added
            h = self._layer_norm(x, f"blocks.{i}.ln2")
            x = x + self._channel_mix(i, h, state["ffn_x_prev"][i])
            state["ffn_x_prev"][i] = h
        return self._layer_norm(x, "ln_out")

    def _time_mix(self, i: int, h: Array, h_prev: Array, S: Array, v_first: Array) -> tuple[Array, Array]:
        """Writes the new S [H, N, N] in place."""
        p = {name.removeprefix(f"blocks.{i}.att."): value for name, value in self.w.items()}
        xr, xw, xk, xv, xa, xg = (h + (h_prev - h) * p[f"x_{j}"] for j in "rwkvag")
        r, k, v = p["receptance.weight"] @ xr, p["key.weight"] @ xk, p["value.weight"] @ xv
        w = np.exp(-np.exp(-0.5) * sigmoid(p["w0"] + np.tanh(xw @ p["w1"]) @ p["w2"]))
        a = sigmoid(p["a0"] + xa @ p["a1"] @ p["a2"])
        g = sigmoid(xg @ p["g1"]) @ p["g2"]
        kk = k * p["k_k"]
        k = k * (1 + (a - 1) * p["k_a"])
        if i == 0:
            v_first = v
        else:
            v = v + (v_first - v) * sigmoid(p["v0"] + xv @ p["v1"] @ p["v2"])
        y = np.zeros(self.C)
        for head in range(self.H):
            at = slice(head * self.N, (head + 1) * self.N)
            kk_h = kk[at] / max(np.sqrt(np.sum(kk[at] ** 2)), 1e-12)
            S[head] = S[head] @ np.diag(w[at]) - np.outer(S[head] @ kk_h, kk_h * a[at]) + np.outer(v[at], k[at])
            y[at] = normalised(S[head] @ r[at], 64e-5) * p["ln_x.weight"][at] + p["ln_x.bias"][at]
            y[at] += np.sum(r[at] * k[at] * p["r_k"][head]) * v[at]
        return p["output.weight"] @ (y * g), v_first

    def _channel_mix(self, i: int, h: Array, h_prev: Array) -> Array:
        mixed = h + (h_prev - h) * self.w[f"blocks.{i}.ffn.x_k"]
        k = np.maximum(self.w[f"blocks.{i}.ffn.key.weight"] @ mixed, 0) ** 2
        return self.w[f"blocks.{i}.ffn.value.weight"] @ k
