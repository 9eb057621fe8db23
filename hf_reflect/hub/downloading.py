"""The files of a published dataset, from the Hub."""

from pathlib import Path

from ..errors import DataError, HubError
from ..launch import first_line, hub_without_retries_on_screen


def downloaded(repo_id: str) -> tuple[Path, list[str]]:
    """A folder with our files of the latest commit, and the names of all its files.

    Raises:
        DataError: the id is none, or no dataset is known by it to whom we are logged in as.
        HubError: the Hub does not let us read it, or cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    hub_without_retries_on_screen()
    ours = ["README.md", "*.json", "checksums.parquet", "data/*.parquet", "candidates/*.parquet"]
    try:
        info = HfApi().dataset_info(repo_id, timeout=30)
        names = sorted(each.rfilename for each in info.siblings or [])
        # by its id, so that no older snapshot of the cache is taken for the latest one
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=info.sha, allow_patterns=ours)), names
    except HFValidationError as error:
        raise DataError(
            f"{repo_id!r} is neither a folder (seen from {Path.cwd()}) nor the id of a dataset: {first_line(error)}"
        ) from error
    except GatedRepoError as error:
        raise HubError(
            f"The Hub does not let us read the dataset {repo_id!r}: its owner asks for consent. Accept the conditions "
            "on its page, log in with `hf auth login`, and try again."
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"There is no folder {repo_id!r} (seen from {Path.cwd()}), and no dataset of this id that we may read on "
            "the Hub. Check the id; if it is private, log in as who may read it: `hf auth login`, or HF_TOKEN."
        ) from error
    except Exception as error:  # of whatever library brings the files: they have no common base
        raise HubError(
            f"The dataset {repo_id!r} could not be read from the Hub: {first_line(error)}\nThere is no such folder "
            "either. Go online (HF_HUB_OFFLINE unset, HF_ENDPOINT right, logged in with `hf auth login` where the "
            "Hub asks who we are), or give a folder."
        ) from error
