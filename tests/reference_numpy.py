"""RWKV-4 to 7 written down a second time, to hold the package against: numpy float64, token by token.

From the equations of the papers (arXiv 2305.13048, 2404.05892, 2503.14456) and of DeepEmbed; shares no code with
`rwkv_stream`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Array = np.ndarray
Layer = Mapping[str, Array]
Mixed = tuple[Array, "Array | None"]  # what time-mix adds to the residual stream, v_first
State = dict[str, Array]  # by the names of `rwkv_stream.model.state`, without the batch axis


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def normalised(x: Array, eps: float) -> Array:
    """Along the last axis."""
    n = x.shape[-1]
    around = x - x.sum(-1, keepdims=True) / n
    return around / np.sqrt((around * around).sum(-1, keepdims=True) / n + eps)


class Reference:
    """weights: official names, vectors of any shape that flattens to C.

    `rounded` is applied to the weights and to everything that plain code in 16 bits keeps in 16 bits: the residual
    stream, the inputs and outputs of every product, but not S and the decays.
    """

    def __init__(
        self,
        weights: Mapping[str, Array],
        version: str = "7",
        group_norm_eps: float = 64e-5,
        rounded: Callable[[Array], Array] = lambda x: x,
    ) -> None:
        self.version, self.eps, self.rounded = version, group_norm_eps, rounded
        self.w = {name: rounded(np.asarray(value, np.float64)) for name, value in weights.items()}
        self.w = {name: value.ravel() if value.shape[:2] == (1, 1) else value for name, value in self.w.items()}
        self.L = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        self.att, self.ffn = (
            [
                {name.split(".", 3)[3]: z for name, z in self.w.items() if name.startswith(f"blocks.{i}.{half}.")}
                for i in range(self.L)
            ]
            for half in ("att", "ffn")
        )
        self.C = self.w["emb.weight"].shape[1]
        heads = {"7": "r_k", "7a": "r_k", "6": "time_faaaa"}.get(version, "time_decay")
        self.H = self.C if version == "4" else self.w[f"blocks.0.att.{heads}"].shape[0]
        self.N = self.C // self.H
        self.time_mix = {
            "4": self._time_mix_4,
            "6": self._time_mix_6,
            "7": self._time_mix_7,
            "7a": self._time_mix_7,
        }.get(version, self._time_mix_5)

    def zero_state(self) -> State:
        L, C, H, N = self.L, self.C, self.H, self.N
        if self.version == "4":
            kv = {"att_num": np.zeros((L, C)), "att_den": np.zeros((L, C)), "att_max": np.full((L, C), -1e30)}
        else:
            kv = {"att_kv": np.zeros((L, H, N, N))}
        return {"att_x_prev": np.zeros((L, C)), **kv, "ffn_x_prev": np.zeros((L, C))}

    def __call__(self, tokens: Sequence[int], state: State | None = None) -> tuple[Array, Array, State]:
        """Hidden states [T, C] after ln_out, logits [T, V], new state."""
        state = {name: part.copy() for name, part in (state or self.zero_state()).items()}
        hidden = np.array([self._token(token, state) for token in tokens])
        return hidden, hidden @ self.w["head.weight"].T, state

    def _layer_norm(self, x: Array, name: str) -> Array:
        return self.rounded(normalised(x, 1e-5) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"])

    def _mixed(self, h: Array, h_prev: Array, mix: Array) -> Array:
        """Token shift of RWKV-4 and 5."""
        return self.rounded(h * mix + h_prev * (1 - mix))

    def _shifted(self, h: Array, h_prev: Array, maa: Array) -> Array:
        """Token shift of RWKV-6 and 7."""
        return self.rounded(h + (h_prev - h) * maa)

    def _product(self, weight: Array, x: Array) -> Array:
        return self.rounded(weight @ self.rounded(x))

    def _low_rank(self, x: Array, w1: Array, w2: Array, activation: Callable[[Array], Array] = lambda z: z) -> Array:
        return self._product(w2.T, activation(self._product(w1.T, x)))

    def _head_norm(self, y: Array, p: Mapping[str, Array]) -> Array:
        """y [H, N] → [C]."""
        return normalised(y, self.eps).ravel() * p["ln_x.weight"] + p["ln_x.bias"]

    def _token(self, token: int, state: State) -> Array:
        embedded = x = self._layer_norm(self.w["emb.weight"][token], "blocks.0.ln0")
        v_first = np.zeros(0)
        for i in range(self.L):
            h = self._layer_norm(x, f"blocks.{i}.ln1")
            kv = [part[i] for name, part in state.items() if not name.endswith("_x_prev")]
            added, v_first = self.time_mix(self.att[i], h, state["att_x_prev"][i], kv, v_first if i else None)
            state["att_x_prev"][i] = h
            x = self.rounded(x + added)
            h = self._layer_norm(x, f"blocks.{i}.ln2")
            x = self.rounded(x + self._channel_mix(i, h, state["ffn_x_prev"][i], token, embedded))
            state["ffn_x_prev"][i] = h
        return self._layer_norm(x, "ln_out")

    # Each writes the new state of its layer in place: kv is [S] with S [H, N, N], of RWKV-4 [num, den, max].

    def _time_mix_4(self, p: Layer, h: Array, h_prev: Array, kv: list[Array], v_first: Array | None) -> Mixed:
        num, den, top = kv
        xk, xv, xr = (self._mixed(h, h_prev, p[f"time_mix_{j}"]) for j in "kvr")
        r, k, v = (
            sigmoid(self._product(p["receptance.weight"], xr)),
            self._product(p["key.weight"], xk),
            self._product(p["value.weight"], xv),
        )
        w, u = -np.exp(p["time_decay"]), p["time_first"]
        q = np.maximum(top, u + k)
        old, new = np.exp(top - q), np.exp(u + k - q)
        wkv = (old * num + new * v) / (old * den + new)
        q = np.maximum(top + w, k)
        old, new = np.exp(top + w - q), np.exp(k - q)
        num[:], den[:], top[:] = old * num + new * v, old * den + new, q
        return self._product(p["output.weight"], r * wkv), None

    def _time_mix_5(self, p: Layer, h: Array, h_prev: Array, kv: list[Array], v_first: Array | None) -> Mixed:
        (S,) = kv
        mixed = {j: self._mixed(h, h_prev, p[f"time_mix_{j}"]) for j in "kvrg" if f"time_mix_{j}" in p}
        r, k, v = (self._product(p[f"{n}.weight"], mixed[n[0]]) for n in ("receptance", "key", "value"))
        u = np.exp(p["time_first"]) if "time_first" in p else p["time_faaaa"]
        w = np.exp(-np.exp(p["time_decay"]))
        y = self._read_and_write(S, r, np.broadcast_to(w.reshape(self.H, -1), (self.H, self.N)), k, v, u)
        out = self._head_norm(y, p)
        if "gate.weight" in p:
            out = out * silu(self._product(p["gate.weight"], mixed["g"]))
        return self._product(p["output.weight"], out), None

    def _time_mix_6(self, p: Layer, h: Array, h_prev: Array, kv: list[Array], v_first: Array | None) -> Mixed:
        (S,) = kv
        z = np.tanh(self._product(p["time_maa_w1"].T, self._shifted(h, h_prev, p["time_maa_x"]))).reshape(5, -1)
        m = {j: self._product(p["time_maa_w2"][n].T, z[n]) for n, j in enumerate("wkvrg")}
        x = {j: self._shifted(h, h_prev, p[f"time_maa_{j}"] + m[j]) for j in "wkvrg"}
        r, k, v = (self._product(p[f"{n}.weight"], x[n[0]]) for n in ("receptance", "key", "value"))
        log_w = -np.exp(p["time_decay"] + self._low_rank(x["w"], p["time_decay_w1"], p["time_decay_w2"], np.tanh))
        y = self._read_and_write(S, r, np.exp(log_w).reshape(self.H, self.N), k, v, p["time_faaaa"])
        return self._product(
            p["output.weight"], self._head_norm(y, p) * silu(self._product(p["gate.weight"], x["g"]))
        ), None

    def _read_and_write(self, S: Array, r: Array, w: Array, k: Array, v: Array, u: Array) -> Array:
        """RWKV-5 and 6: S [H, key, value] in place, w [H, N], u broadcast over the value axis → y [H, N]."""
        r, v = (z.reshape(self.H, 1, -1) for z in (r, v))
        w, k, u = (z.reshape(self.H, -1, 1) for z in (w, k, u))
        written = k * v
        y = r @ (S + u * written)
        S[:] = w * S + written
        return y[:, 0]

    def _time_mix_7(self, p: Layer, h: Array, h_prev: Array, kv: list[Array], v_first: Array | None) -> Mixed:
        (S,) = kv
        xr, xw, xk, xv, xa, xg = (self._shifted(h, h_prev, p[f"x_{j}"]) for j in "rwkvag")
        r, k, v = (
            self._product(p["receptance.weight"], xr),
            self._product(p["key.weight"], xk),
            self._product(p["value.weight"], xv),
        )
        w = np.exp(-np.exp(-0.5) * sigmoid(p["w0"] + self._low_rank(xw, p["w1"], p["w2"], np.tanh)))
        a = sigmoid(p["a0"] + self._low_rank(xa, p["a1"], p["a2"]))
        g = self._low_rank(xg, p["g1"], p["g2"], sigmoid)
        kk = k * p["k_k"]
        k = k * (1 + (a - 1) * p["k_a"])
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * sigmoid(p["v0"] + self._low_rank(xv, p["v1"], p["v2"]))
        r, w, k, kk, a, by_head = (
            z.reshape(self.H, 1, self.N) for z in (r, w, k, kk, a, v)
        )  # rows, once for each head
        kk = kk / np.maximum(np.sqrt((kk * kk).sum(-1, keepdims=True)), 1e-12)
        S[:] = S * w - (S * kk).sum(-1, keepdims=True) * (kk * a) + by_head.reshape(self.H, -1, 1) * k
        y = self._head_norm((S * r).sum(-1), p)
        y += ((r * k * p["r_k"][:, None]).sum(-1, keepdims=True) * by_head).ravel()
        return self._product(p["output.weight"], y * g), v_first

    def _channel_mix(self, i: int, h: Array, h_prev: Array, token: int, embedded: Array) -> Array:
        p = self.ffn[i]
        if self.version in ("7", "7a"):
            k = np.maximum(self._product(p["key.weight"], self._shifted(h, h_prev, p["x_k"])), 0) ** 2
            if self.version == "7a":
                R = p["s1"].shape[1]
                table = (p["s_emb.weight"][token] + self._product(p["s_emb_x.weight"], embedded)).reshape(R, R)
                k = k * (((h @ p["s1"]) @ table) @ p["s2"] + p["s0"])
            return self._product(p["value.weight"], k)
        if self.version == "6":
            xk, xr = (self._shifted(h, h_prev, p[f"time_maa_{j}"]) for j in "kr")
        else:
            xk, xr = (self._mixed(h, h_prev, p[f"time_mix_{j}"]) for j in "kr")
        k = np.maximum(self._product(p["key.weight"], xk), 0) ** 2
        return sigmoid(self._product(p["receptance.weight"], xr)) * (self._product(p["value.weight"], k))
