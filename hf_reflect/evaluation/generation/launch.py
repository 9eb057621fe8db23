"""The processes of a launch that generates, and the model on each."""

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError, SettingsError
from ...launch import load_tokenizer
from ...parsing.reply import shortened

if TYPE_CHECKING:
    from accelerate import PartialState


def join_launch(use_cpu: bool = False) -> "PartialState":
    """This process among those of its launch; all but the first show no bars.

    Raises:
        SettingsError: several processes were launched, but each runs alone.
    """
    import datasets
    import transformers
    from accelerate import PartialState

    # the shares end at different times: nobody gives up waiting for the longest
    state = PartialState(cpu=use_cpu, timeout=timedelta(days=7))
    if state.num_processes != (launched := int(os.environ.get("WORLD_SIZE", "1"))):
        raise SettingsError(
            f"{launched} processes were launched, but each runs alone: on a CPU add `--use_cpu true`; otherwise check "
            "the accelerate configuration."
        )
    if not state.is_main_process:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    return state


def load_student(
    model: str, dtype: str = "auto", trust_remote_code: bool = False, adapter: str | None = None
) -> tuple[Any, Any]:
    """A model and its tokenizer on this process's device, with a PEFT adapter on top where one is named.

    Raises:
        DataError: there is no such model or adapter, or it cannot be loaded.
    """
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM

    has_words = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(adapter if adapter and has_words else model, trust_remote_code=trust_remote_code)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=trust_remote_code)
        if adapter is not None:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(loaded, adapter)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        what = f"The model {model!r}" + (f" with the adapter {adapter!r}" if adapter else "")
        raise DataError(
            f"{what} cannot be loaded: {shortened(str(error) or type(error).__name__, 300)}\nGive a folder of "
            "`save_pretrained`, or an id on the Hub (and be online, and logged in where it is gated)."
        ) from error
    return loaded.to(PartialState().device).eval(), tokenizer
