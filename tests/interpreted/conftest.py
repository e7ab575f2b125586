from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter  # noqa: F401
