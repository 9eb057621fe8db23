"""Two CPU processes for tests, as people launch them: by the accelerate configurations that are shipped."""

import json
import os
import subprocess
import sys

import yaml
from conftest import ROOT

CONFIGURATIONS = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))


def on_cpu(name, folder):
    """A shipped configuration in the spelling that starts two CPU processes."""
    shipped = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
    shipped |= {"use_cpu": True, "num_processes": 2}
    if shipped["distributed_type"] == "DEEPSPEED":
        given = shipped["deepspeed_config"]
        stage = given["zero_stage"]
        # without a threshold of 0 nothing of a model this small is partitioned
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        for part in ("optimizer", "param"):
            if (device := given.get(f"offload_{part}_device", "none")) != "none":
                zero[f"offload_{part}"] = {"device": device}
        settings = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": zero,
        }
        (folder / "deepspeed.json").write_text(json.dumps(settings))
        shipped["deepspeed_config"] = {
            "deepspeed_config_file": str(folder / "deepspeed.json"),
            "zero3_init_flag": given.get("zero3_init_flag", False),
        }
        del shipped["mixed_precision"]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(shipped))
    return path


def command(script, *arguments, config=None):
    """A script's command line, launched with this configuration or by itself."""
    start = [sys.executable]
    if config is not None:
        start += ["-m", "accelerate.commands.launch", "--config_file", config]
    return [str(part) for part in (*start, ROOT / script, *arguments)]


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}


def launch(script, *arguments, config=None, timeout=900):
    """Run it to its end, which must be a good one."""
    done = subprocess.run(
        command(script, *arguments, config=config),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done
