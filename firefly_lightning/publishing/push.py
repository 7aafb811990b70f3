"""``firefly push``: a model's folder, an adapter or a GGUF into a repository of the Hugging Face hub, in one commit."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from firefly_lightning.errors import FireflyError, reason, shown, some

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from huggingface_hub.hf_api import ModelInfo

    from firefly_lightning.files.published import Published

Answer = TypeVar("Answer")

_NAME = re.compile(r"(?!.*(--|\.\.|\.git$))\w[\w.-]{0,94}/\w([\w.-]{0,94}\w)?", re.ASCII)
"""What the hub takes for a name."""


def push(
    source: str,
    repo: str,
    public: bool = False,
    base: str | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> None:
    """Uploads a model's folder, an adapter or a GGUF to the Hugging Face hub, or to the one that HF_ENDPOINT names.

    Only the files that firefly export and firefly prune write are uploaded, and what else lies in the folder is named.
    All come in one commit, so that the repository has the new model or the old one. Files of the same names are
    replaced; the history of the repository keeps the old ones. Log in before with hf auth login, or set HF_TOKEN.

    Args:
        source: Hugging Face folder of a model or an adapter, or a .gguf file.
        repo: The repository, OWNER/NAME; made where it is not there, as a private one.
        public: Makes a new repository that everybody sees, or allows one that everybody sees already.
        base: Hub name of the model that an adapter was trained on, where the adapter names a folder of this machine.
        revision: Branch to commit to, made where it is not there; main by default.
        message: What the history says of it.

    Raises:
        FireflyError: If a file is missing or damaged, which is found before anything is sent, or if the hub does not
            take it; then it has what it had before.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    from firefly_lightning.files.published import find_published

    folder = Path(source).expanduser()
    published = find_published(folder)
    _check_name("--repo", repo)
    if base is not None:
        _check_name("--base", base)
    changed = _changed(published, folder, base)
    hub = _Hub(repo, revision)
    if base:
        hub.check_base(base)
    there = hub.open(public)
    gone = _stale(published, there, repo)
    additions = [CommitOperationAdd(name, changed.get(name, file)) for name, file in published.files.items()]
    deletions = [CommitOperationDelete(name) for name in gone]
    commit = hub.commit([*additions, *deletions], message or f"{published.kind} of firefly_lightning")
    if missing := sorted(published.files.keys() - hub.names(commit, [*published.files])):
        raise FireflyError(f"{repo}: its .gitignore leaves out {some(missing)}; take them from it, and push again")
    if published.left:
        print(f"not uploaded, since no export names them: {some([shown(name) for name in published.left], 8)}")
    if replaced := sorted(published.files.keys() & set(there)):
        print(f"replaced where they differ, and kept in the history: {some(replaced, 8)}")
    if gone:
        print(f"removed, as of an earlier model, and kept in the history: {some(gone, 8)}")
    print(f"{hub.page}: {'private' if hub.private else 'public'}, commit {commit[:8]}; use it: {_use(published, hub)}")


class _Hub:
    """A repository of the hub, whose answers are told in one line each.

    Args:
        repo: Its name.
        revision: Branch to commit to; main for None.

    Attributes:
        private: Whether only those with the right see it; known once it is open.

    Raises:
        FireflyError: If the user is off line or not logged in.
    """

    def __init__(self, repo: str, revision: str | None) -> None:
        from huggingface_hub import HfApi, constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise FireflyError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
        self.repo, self.revision, self.private, self._api = repo, revision, True, HfApi()
        self.page = f"{constants.ENDPOINT}/{repo}" + (f"/tree/{revision}" if revision else "")
        if not constants.ENDPOINT.startswith(("http://", "https://")):
            raise FireflyError(
                f"HF_ENDPOINT {constants.ENDPOINT}: is no address; write https:// and a host, or unset it"
            )
        token = self._ask(get_token)
        if token is None:
            raise FireflyError("not logged in to the hub; run hf auth login, or set HF_TOKEN to a token that may write")
        if not token.isascii():
            raise FireflyError("HF_TOKEN holds characters that no token has; copy it from the hub again")

    def check_base(self, base: str) -> None:
        """Refuses a base that the hub has not."""
        self._ask(lambda: self._api.model_info(base), base)

    def open(self, public: bool) -> list[str]:
        """Names of the files of the branch; makes the repository or the branch where it is not there.

        Raises:
            FireflyError: If everybody sees it and that was not asked for, or it cannot be made.
        """
        info = self._ask(lambda: self._look_or_make(public))
        self.private = bool(info.private)
        if not self.private and not public:
            raise FireflyError(f"{self.repo}: is public, so that everybody would see it; allow that with --public")
        if self.private and public:
            print(f"{self.repo}: is private and stays so; its page on the hub has a setting for that")
        if self.revision:
            info = self._ask(self._branch)
        return [one.rfilename for one in info.siblings or []]

    def commit(self, operations: list[Any], message: str) -> str:
        """Uploads what the hub has not, and makes one commit; gives its number."""
        made: CommitInfo = self._ask(
            lambda: self._api.create_commit(
                self.repo, operations, commit_message=message, revision=self.revision, run_as_future=False
            )
        )
        return made.oid

    def names(self, commit: str, wanted: list[str]) -> set[str]:
        """Those of some names that a commit has."""
        found = self._ask(lambda: self._api.get_paths_info(self.repo, wanted, revision=commit))
        return {one.path for one in found}

    def _look_or_make(self, public: bool) -> "ModelInfo":
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            return self._api.model_info(self.repo)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            self._api.create_repo(self.repo, private=not public)
            return self._api.model_info(self.repo)

    def _branch(self) -> "ModelInfo":
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            return self._api.model_info(self.repo, revision=self.revision)
        except RevisionNotFoundError:
            self._api.create_branch(self.repo, branch=str(self.revision), exist_ok=True)
            return self._api.model_info(self.repo, revision=self.revision)

    def _ask(self, call: Callable[[], Answer], name: str | None = None) -> Answer:
        from firefly_lightning.files.hub import hub_problem

        name = name or self.repo
        try:
            return call()
        except Exception as error:  # of many types, by what the network and the hub answer
            problem = hub_problem(error, name) or f"the upload failed ({reason(error)}); the hub has what it had before"
            if "xet" in str(error):
                problem += "; where a mirror knows no Xet, set HF_HUB_DISABLE_XET=1"
            raise FireflyError(f"{name}: {problem}") from error


def _check_name(flag: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise FireflyError(
            f"{flag} {shown(name)}: is no name on the hub; write OWNER/NAME, in letters, digits, -, _ and ."
        )


def _use(published: "Published", hub: _Hub) -> str:
    """The command with which others, or another machine, use what was pushed."""
    if published.kind == "GGUF":
        return f"llama-cli -hf {hub.repo} -hff {shlex.quote(next(iter(published.files)))}"
    if hub.revision:
        return f"hf download {hub.repo} --revision {shlex.quote(hub.revision)} --local-dir FOLDER"
    return f"firefly chat --model {hub.repo}"


def _changed(published: "Published", folder: Path, base: str | None) -> dict[str, bytes]:
    """Contents of files that say what is of this machine alone, without that.

    Raises:
        FireflyError: If an adapter's base is a folder of this machine, and no other is named.
    """
    from firefly_lightning.files.json_object import read_json_object
    from firefly_lightning.files.model_json import CURE, adapter_base
    from firefly_lightning.files.published import ADAPTER, CARD

    changed: dict[str, bytes] = {}
    if file := published.files.get("pruning.json"):
        fields = read_json_object(file, CURE)
        if fields.pop("linked", None):  # paths of the large model's files
            changed["pruning.json"] = _json(fields)
    if published.kind != "adapter":
        if base:
            raise FireflyError(f"{folder}: is no adapter; leave --base out")
        return changed
    own = read_json_object(folder / ADAPTER[0], CURE)
    recorded = str(own["base_model_name_or_path"])
    found = Path(adapter_base(folder) or recorded)
    if base is None:
        if found.is_dir() or found.is_absolute():
            raise FireflyError(
                f"{folder}: is an adapter of {recorded}, a folder of this machine; push that and name it with --base "
                "OWNER/NAME, or push the folder that firefly export --out makes of both"
            )
        return changed
    changed[ADAPTER[0]] = _json(own | {"base_model_name_or_path": base})
    if file := published.files.get(CARD):
        changed[CARD] = _on_base(file.read_text("utf-8"), recorded, base).encode()
    return changed


def _on_base(card: str, recorded: str, base: str) -> str:
    """The card of an adapter that names its base on the hub, in its text and in what the hub reads."""
    from huggingface_hub import ModelCard

    begun = "It began with the weights of"
    text = card.replace(recorded, base).replace(f"{begun} {shown(Path(recorded).name)}.", f"{begun} {base}.")
    try:
        read = ModelCard(text, ignore_metadata_errors=True)
        read.data["base_model"] = base
        return str(read)
    except Exception:  # of what a person has written at its head, whatever a reader of YAML raises
        return text


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, ensure_ascii=False, indent=2) + "\n").encode()


def _stale(published: "Published", there: list[str], repo: str) -> list[str]:
    """Files of an earlier push that go with this one, since they would be read with the new ones or instead of them.

    Raises:
        FireflyError: If the repository holds an adapter and this is a model, or the other way round.
    """
    from firefly_lightning.files.published import ADAPTER, stale

    if published.kind == "GGUF":
        return []
    held = "adapter" if ADAPTER[0] in there else "model" if "config.json" in there else published.kind
    if held != published.kind:
        raise FireflyError(
            f"{repo}: holds {held} files, and this is of kind {published.kind}; choose another repository"
        )
    return stale(there, published.files)
