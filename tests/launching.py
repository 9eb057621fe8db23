"""Two CPU processes for tests, as people launch them: by the accelerate configurations that are shipped."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import yaml
from conftest import ROOT


def on_cpu(name, folder):
    """A shipped configuration in the spelling that starts two CPU processes."""
    return configured(name, folder, use_cpu=True, num_processes=2)


def on_gpus(name, folder):
    """A shipped configuration for the GPUs that there are."""
    import torch

    return configured(name, folder, num_processes=torch.cuda.device_count())


def configured(name, folder, **changes):
    """DeepSpeed's settings go into a file: without a threshold of 0 nothing of a model this small is partitioned."""
    shipped = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text()) | changes
    if shipped["distributed_type"] == "DEEPSPEED":
        stage = shipped["deepspeed_config"]["zero_stage"]
        settings = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        }
        (folder / "deepspeed.json").write_text(json.dumps(settings))
        init = shipped["deepspeed_config"].get("zero3_init_flag", False)
        shipped["deepspeed_config"] = {
            "deepspeed_config_file": str(folder / "deepspeed.json"),
            "zero3_init_flag": init,
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


def kill_when(ready, line, rank=None, **popen):
    """Start, wait until it is ready, kill -9 the process or a rank: seconds until all was over, and how it ended."""
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True, **popen)
    try:
        until = time.monotonic() + 240
        while not ready():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        victim = psutil.Process(process.pid)
        if rank is not None:
            (victim,) = [child for child in victim.children(True) if child.environ().get("RANK") == str(rank)]
        killed = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        process.wait(120)
        return time.monotonic() - killed, process.returncode
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
