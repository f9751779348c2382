"""Publishing an adapter on the Hugging Face hub, through huggingface_hub and its login.

Whether that may be done is asked before a run begins, so that it does not fail after hours. Only
the adapter, its tokenizer and its model card are uploaded: no checkpoint, nothing of the data, and
of paths of this machine only the last part.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.checkpoint.peft import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from halfbyte.checkpoint.reading import read_json
from halfbyte.config.command_line import invocation
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import CheckpointError, ConfigError, UploadError, UserError
from halfbyte.foreign_text import shorten
from halfbyte.report.model_card import MODEL_CARD, is_ours, last_part, write_model_card

if TYPE_CHECKING:
    from halfbyte.report import RunReport

# What save_adapter writes, with the names that tokenizers give to their files.
_PUBLISHED = (
    *(CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, MODEL_CARD),
    *("tokenizer*.json", "tokenizer*.model", "chat_template*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    "additional_chat_templates/*",
)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class HubRepository:
    """A repository on the hub.

    Attributes:
        name: ``owner/name``.
        private: Whether it is created private; one that exists stays as it is.
    """

    name: str
    private: bool = True

    def require_access(self) -> None:
        """Check that the adapter may be uploaded there. Nothing is created.

        Raises:
            ConfigError: It may not, or that cannot be found out.
        """
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import (
            HfHubHTTPError,
            LocalTokenNotFoundError,
            RepositoryNotFoundError,
        )

        if constants.HF_HUB_OFFLINE:
            raise ConfigError(f"nothing can be uploaded to {self.name}: HF_HUB_OFFLINE is set")
        api = HfApi()
        try:
            user = api.whoami()
        except LocalTokenNotFoundError:
            raise ConfigError(f"to upload to {self.name}, {_LOG_IN}") from None
        except Exception as error:  # of whichever HTTP library huggingface_hub uses
            raise ConfigError(
                f"cannot upload to {self.name}: the hub does not say who you are "
                f"({_reason(error)}); {_LOG_IN}, or leave out the upload"
            ) from error
        login = user.get("auth", {}).get("accessToken", {})
        if login.get("role") == "read":
            raise ConfigError(
                f"cannot upload to {self.name}: the token that is logged in may only read; create "
                f"one that may write, and {_LOG_IN}"
            )
        try:
            api.auth_check(self.name, write=True)
        except RepositoryNotFoundError:
            self._require_own(user)
        except HfHubHTTPError as error:
            raise ConfigError(
                f"{user.get('name')} may not write to {self.name} ({_reason(error)}); give another "
                "repository, or a token that may"
            ) from error
        except Exception as error:
            raise ConfigError(f"cannot upload to {self.name}: {_reason(error)}") from error

    def _require_own(self, user: dict[str, Any]) -> None:
        """Check that a repository of this name can be created."""
        owner, _, _ = self.name.partition("/")
        groups = {
            str(one.get("name")): one.get("roleInOrg")
            for one in user.get("orgs") or []
            if isinstance(one, dict)
        }
        owners = [str(user.get("name")), *(one for one, role in groups.items() if role != "read")]
        if owner not in owners:
            raise ConfigError(
                f"{self.name} does not exist, and you cannot create it: expected the owner to be "
                f"{' or '.join(map(shorten, owners))}"
            )

    def push(self, directory: Path, report: "RunReport") -> str:
        """Upload an adapter in one commit; return the address of the repository.

        Raises:
            CheckpointError: The directory holds no adapter.
            UploadError: The upload failed; the adapter on this machine is as it was.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        files = _published(directory)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api = HfApi()
        try:
            with report.task(f"uploading to {self.name}"), _without_bars():
                url = api.create_repo(self.name, private=self.private, exist_ok=True)
                api.create_commit(
                    self.name, operations, commit_message="Upload an adapter with halfbyte"
                )
        except (Exception, KeyboardInterrupt) as error:
            again = invocation("push", str(directory), self.name)
            again += "" if self.private else " --no-private"
            said = f"the adapter in {directory} is complete, but not uploaded to {self.name}"
            if isinstance(error, KeyboardInterrupt):
                report.note(f"{said}. To do it: {again}")
                raise
            raise UploadError(f"{said}: {_reason(error)}. To try again: {again}") from error
        report.note(f"uploaded {len(files)} files to {url}")
        return str(url)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep huggingface_hub from drawing progress bars over our own display."""
    from huggingface_hub import utils

    shown = not utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    if shown:
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


def _reason(error: BaseException) -> str:
    """The first lines of an error and of its cause, to be quoted within a sentence."""
    found = [error] if error.__cause__ is None else [error, error.__cause__]
    lines = [str(one).strip().partition("\n")[0].rstrip(". ") or repr(one) for one in found]
    return shorten(": ".join(lines), 300)


def repository_of(config: TrainConfig) -> HubRepository | None:
    """The repository that a run is to be uploaded to, to which it may be; None without one.

    Raises:
        ConfigError: It may not.
    """
    if config.push_to_hub is None:
        return None
    repository = HubRepository(config.push_to_hub, config.hub_private)
    repository.require_access()
    return repository


def require_adapter(directory: Path) -> None:
    """Check that a directory holds an adapter.

    Raises:
        CheckpointError: A file is missing.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory} is not the directory of an adapter: it has no {name}"
            )


def _published(directory: Path) -> dict[str, str | bytes]:
    """The files to upload, by their names there: their paths, or their content if it differs.

    Raises:
        CheckpointError: The directory holds no adapter.
    """
    require_adapter(directory)
    paths = {path for name in _PUBLISHED for path in directory.glob(name) if path.is_file()}
    files: dict[str, str | bytes] = {
        path.relative_to(directory).as_posix(): str(path) for path in sorted(paths)
    }
    for name, keys in ((CONFIG_NAME, ("base_model_name_or_path",)), (CARD_NAME, ("base", "name"))):
        if name in files:
            fields = read_json(directory / name, "halfbyte writes one")
            owner = fields
            for key in keys[:-1]:
                owner = owner.get(key) or {}
            known = owner.get(keys[-1])
            if isinstance(known, str) and is_local(known):
                owner[keys[-1]] = last_part(known)
                files[name] = json.dumps(fields, indent=2).encode() + b"\n"
    return files


def is_local(model: str) -> bool:
    """Whether a model's name is a path of this machine, and not ``owner/name`` on the hub."""
    if Path(model).expanduser().exists() or model.count("/") != 1 or model.endswith(".gguf"):
        return True
    return model.startswith(("/", ".", "~"))


def describe(directory: Path, repository: str | None, *, online: bool) -> Path | None:
    """Write the model card of an adapter, unless there is another file of its name.

    Args:
        directory: The adapter's directory.
        repository: Where it is to be published, if that is known.
        online: Whether the hub may be asked about the base model.

    Returns:
        The card, or None if another file has its name.

    Raises:
        CheckpointError: A file of the adapter is missing or damaged.
        OutputError: The card cannot be written.
    """
    if not is_ours(directory / MODEL_CARD):
        return None
    fields = read_json(directory / CONFIG_NAME, "an adapter's directory holds one")
    name = str(fields.get("base_model_name_or_path") or "")
    if is_local(name):
        return write_model_card(directory, repository, None, _license_here(Path(name)))
    known, license_id = _ask_hub(name) if online else (True, None)
    return write_model_card(directory, repository, name if known else None, license_id)


def describe_run(directory: Path, repository: HubRepository | None, report: "RunReport") -> None:
    """Write the model card of a run that has ended; what is in the way is logged."""
    name = None if repository is None else repository.name
    try:
        if describe(directory, name, online=repository is not None) is None:
            report.note(f"{directory / MODEL_CARD} is not halfbyte's, and stays as it is")
    except UserError as error:  # the adapter is complete; it must not look as if it were not
        report.note(str(error))


def _ask_hub(model: str) -> tuple[bool, str | None]:
    """Whether a base model is on the hub, and its license."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        card = HfApi().model_info(model).card_data
    except RepositoryNotFoundError:
        return False, None
    except Exception:  # the card is written without a license; the upload tells of the cause
        return True, None
    return True, _license(card.get("license") if card is not None else None)


def _license_here(model: Path) -> str | None:
    """The license that a local base model's own files name."""
    model = model.expanduser()
    try:
        if model.is_file():
            from halfbyte.checkpoint.gguf_file import GGUFFile

            key = GGUFFile(model).keys.get("general.license")
            return _license(key.value if key is not None else None)
        if (model / MODEL_CARD).is_file():
            from huggingface_hub import metadata_load

            return _license((metadata_load(model / MODEL_CARD) or {}).get("license"))
    except (OSError, ValueError, UserError):  # the base model has gone, or its card is no card
        return None
    return None


def _license(found: Any) -> str | None:
    """A license's id, if it is one."""
    plain = isinstance(found, str) and found.replace("-", "").replace(".", "").isalnum()
    return found.lower() if plain and len(found) < 60 else None
