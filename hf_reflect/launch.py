"""How a recipe starts and fails: tables and tokenizers from anywhere, errors said once and short."""

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import huggingface_hub
import pyarrow as pa
from datasets import Dataset, DatasetDict

from .errors import DataError, Interrupted, ReflectError

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig, SFTTrainer


def main_of(recipe: Callable[[], None]) -> None:
    """Run a recipe; what its user can mend is said by rank 0 alone, in a few lines, without a traceback."""
    try:
        recipe()
    except ReflectError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{error}", file=sys.stderr, flush=True)
        else:
            time.sleep(30)  # rank 0 speaks, and its exit ends this process; exiting first would end rank 0
            print(f"\n[rank {os.environ['RANK']}] {error}", file=sys.stderr, flush=True)  # rank 0 had no such error
        sys.exit(1)
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0" and not isinstance(error.__cause__, Interrupted):  # else it was said
            print(
                "\nStopped. What was answered is in the ledger: the same command goes on from there.", file=sys.stderr
            )
        sys.exit(130)


def load_table(path: str, split: str = "train", what: str = "dataset", config: str | None = None) -> Dataset:
    """A split from a folder of `save_to_disk`, a JSON, JSONL, CSV or Parquet file, or the Hub.

    Of a dataset that has the configuration `config`, as `push_recycled` makes one of candidates, that one.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    kinds = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    local = Path(path).expanduser()
    path = str(local) if path.startswith("~") else path
    looks_local = local.exists() or path.startswith((".", "/", "~")) or local.suffix in kinds or path.count("/") > 1
    if looks_local and not local.exists():
        raise DataError(f"The {what} {path!r} does not exist (seen from {Path.cwd()}). Check the path.")
    hub_without_retries_on_screen()
    try:
        if (local / "dataset_info.json").exists() or (local / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(path)
        elif local.is_file():
            if local.suffix not in kinds:
                raise DataError(f"The {what} {path!r} is a file of unknown kind; known are {', '.join(kinds)}.")
            loaded = datasets.load_dataset(kinds[local.suffix], data_files=path)
        else:
            loaded = _load(path, config)
    except ReflectError:
        raise
    except StopIteration as error:
        raise DataError(f"The {what} {path!r} is empty.") from error
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        nowhere = "" if local.exists() else f"there is no such file or folder in {Path.cwd()}, and "
        raise DataError(
            f"The {what} {path!r} cannot be loaded: {nowhere}{first_line(error)}\nGive a folder of `save_to_disk`, "
            "a .json, .jsonl, .csv or .parquet file, or the id of a dataset on the Hub (and be online)."
        ) from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise DataError(f"The {what} {path!r} has no split {split!r}; it has {', '.join(loaded)}. Set `split`.")
        loaded = loaded[split]
    if not len(loaded):
        raise DataError(f"The {what} {path!r} is empty.")
    return loaded


def saved_table(folder: Path) -> Dataset | None:
    """A table that `save_to_disk` wrote; None where there is none.

    Raises:
        DataError: it cannot be read.
    """
    if not folder.exists():
        return None
    try:
        return Dataset.load_from_disk(str(folder)).with_format(None)
    except IndexError as error:  # how `datasets` says that no file belongs to it
        raise DataError(f"{folder} has no rows. Make it anew, or move it away.") from error
    except (OSError, ValueError, KeyError, RuntimeError, pa.ArrowException) as error:
        words = first_line(error).rstrip(".")
        raise DataError(f"{folder} cannot be read as a saved dataset: {words}. Make it anew.") from error


def _load(path: str, config: str | None) -> DatasetDict:
    if config is not None:
        try:
            return datasets.load_dataset(path, config)
        except ValueError as error:
            if f"BuilderConfig '{config}' not found" not in str(error):
                raise
    return datasets.load_dataset(path)


def revision_of(dataset: Dataset) -> str | None:
    """The commit of the Hub that a table was loaded from; None where it came from elsewhere."""
    # `datasets` keeps it nowhere but in the name of the folder of its Arrow files
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    found = folders.pop() if len(folders) == 1 else ""
    return found if re.fullmatch("[0-9a-f]{40}", found) else None


def hub_without_retries_on_screen() -> None:
    """One message at the end says more than a line a retry."""
    huggingface_hub.logging.set_verbosity_error()


def first_line(error: BaseException) -> str:
    """What the innermost cause of an error says first."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:300]


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The student's tokenizer.

    Raises:
        DataError: there is no such model.
    """
    from transformers import AutoTokenizer

    hub_without_retries_on_screen()
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        local = "no such folder" if model.startswith((".", "/", "~")) and not Path(model).exists() else None
        raise DataError(
            f"The student {model!r} cannot be loaded: {local or first_line(error)}\nGive a folder of "
            "`save_pretrained`, or the id of a model on the Hub (and be online, and logged in where it is gated)."
        ) from error


def local_tokenizer(run_dir: Path, student: str | None) -> Any | None:
    """A run's student's tokenizer, where this machine has it: in the run's folder or the Hub's cache; else None."""
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer_config.json")
    own = [run_dir / name for name in ("model", "student") if any((run_dir / name / file).exists() for file in files)]
    for place in [*own, *([student] if student else [])]:
        try:
            return AutoTokenizer.from_pretrained(str(place), local_files_only=True)
        except (OSError, ValueError, ImportError, KeyError):
            continue
    return None


def build_trainer(model: "ModelConfig", tokenizer: Any, rows: Dataset, arguments: "SFTConfig") -> "SFTTrainer":
    """An SFTTrainer of TRL's own settings for a model: adapter, quantization, precision."""
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    if (plugin := getattr(arguments, "deepspeed_plugin", None)) is not None:
        plugin.set_deepspeed_weakref()  # `release` took it away: with ZeRO-3 the model loads in parts
    return SFTTrainer(
        model=model.model_name_or_path,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def release(trainer: Any) -> None:
    """All ranks: give back what a trainer holds, so that the next one of the launch begins as if it were the first.

    The trainer is no trainer any more afterwards, and its callbacks and its model are nobody's. Until the next
    `build_trainer` models load whole, and generate by themselves, though the launch trains with ZeRO-3.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils.memory import clear_device_cache
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    trainer.accelerator.free_memory()
    for parameter in trainer.model.parameters():
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3: DeepSpeed's own lists keep modules alive, so these give way here
            parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)
    vars(trainer).clear()  # whoever still holds it holds no memory
    AcceleratorState._reset_state()  # else the next trainer cannot bring its DeepSpeed settings; processes stay joined
    unset_hf_deepspeed_config()
    clear_device_cache(garbage_collection=True)
