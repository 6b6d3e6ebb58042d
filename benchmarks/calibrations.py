"""Makes the calibrations of the bundled models in samples/calibrations: 200 trajectories each.

    python benchmarks/calibrations.py [dpm-20-5 ...]

It resumes after an interruption, and replaces calibrations of other weights.
"""

from bundled import Bundled, named, prompts, report

from diffusers_guidance import CalibrationMismatch, calibrate, samples

NEGATIVE = ("", "noto emoji", "", "face")
"""Half of the trajectories have the empty negative prompt."""


def main() -> None:
    bundled = Bundled()
    for name in named():
        path = samples.CALIBRATIONS / f"{name}.safetensors"
        settings = bundled.set_up(name) | {
            "trajectories": 200,
            "negative_prompts": NEGATIVE,
            "batch_size": 16,
            "path": path,
        }
        texts = prompts(samples.CALIBRATION_PROMPTS)
        try:
            calibrate(bundled.pipe, texts, **settings, progress=report(name))
        except CalibrationMismatch as error:
            print(f"{error}\nmaking it anew", flush=True)
            path.unlink()
            calibrate(bundled.pipe, texts, **settings, progress=report(name))


if __name__ == "__main__":
    main()
