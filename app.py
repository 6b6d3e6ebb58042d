"""The Gradio app: `python app.py --port 7860`. It is also what a Hugging Face Space runs.

Python puts the folder of this file first on `sys.path`, so the checkout's `kernels/` would be taken for
Hugging Face's package of that name. This file removes the folder before it imports anything else.
"""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _HERE]

from diffusers_guidance.pipelines.app.serve import main  # noqa: E402

if __name__ == "__main__":
    main()
