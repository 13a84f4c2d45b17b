"""to=hub: the folder to the Hugging Face hub with huggingface_hub, by the account that is logged in; what fails, in one line.

The folder is written first and stays, so that the same command tries again what the network interrupted.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusion_cli.errors import ConfigError, StorageError, UserError
from diffusion_cli.exporting.record import NAME
from diffusion_cli.runs import say
from diffusion_cli.settings import Export

PROBE_SECONDS = 5  # the library itself would wait for ever


def login(repo: str) -> str:
    """The name of the account that is logged in, known before anything is made. Raises UserError."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise ConfigError("to=hub: nobody is logged in to the hub here: run hf auth login, or set HF_TOKEN")
    api = HfApi()
    with _one_line(repo, ""):
        with suppress(HfHubHTTPError):  # not there yet, but the hub has answered: whoami knows no timeout
            api.model_info(repo, timeout=PROBE_SECONDS)
        return str(api.whoami()["name"])


def push(account: str, folder: Path, files: Sequence[str], settings: Export) -> None:
    """These files and export.json as one commit to settings.repo, which is made if it is not there. Raises UserError."""
    from huggingface_hub import HfApi

    repo = str(settings.repo)
    with _one_line(repo, account, f"; {folder} is whole, and the same command tries again"):
        api = HfApi()
        api.create_repo(repo, private=settings.private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[*files, NAME],
            commit_message=f"diffusion-export: {settings.form}, {settings.weights} weights",
        )
    say(f"pushed to {done.repo_url} by {account}: {done.commit_url}")


@contextmanager
def _one_line(repo: str, account: str, after: str = "") -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise _refused(error, repo, account, after) from None
    except Exception as error:  # the hub's library changes its HTTP library, and so its errors, with every major version
        reason = " ".join(str(error).split())[:200]
        raise StorageError(f"cannot reach the hub for {repo} ({type(error).__name__}: {reason}){after}") from None


def _refused(error: OSError, repo: str, account: str, after: str) -> UserError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    known = {
        401: "the hub does not know this token: run hf auth login, or set HF_TOKEN to a valid one",
        403: f"{account} may not write to {repo}: take a token with the right to write, or a place of your own, "
        f"repo={account}/{repo.partition('/')[2]}",
    }
    if status in known:
        return ConfigError(f"to=hub: {known[status]}" + (f" (it says: {said})" if said else ""))
    return StorageError(f"the hub refused {repo} (status {status}{': ' + said if said else ''}){after}")
