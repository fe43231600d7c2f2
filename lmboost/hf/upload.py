"""A Hub directory to the Hub itself, by way of huggingface_hub: one repository, one commit."""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from lmboost import places
from lmboost.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_TOKEN = "Make a token that may write at the Hub's settings, and set HF_TOKEN to it (or `hf auth login`)"
_EMPTY = {".gitattributes"}  # what a new repository has


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository of the Hub that is to be filled: not there yet, or empty."""

    name: str
    public: bool
    api: Any  # a huggingface_hub.HfApi

    @classmethod
    def find(cls, name: str, public: bool) -> "Repository":
        """Asks the Hub before there is anything to send.

        Raises a UserError where huggingface_hub is missing, the name is no OWNER/NAME, there is no token or the Hub
        does not know it, the Hub cannot be reached, or the repository has files or is not as private as asked.
        """
        if not _NAME.fullmatch(name):
            raise UserError(f"--push={name!r}: expected OWNER/NAME, of letters, digits, '.', '_' and '-'.")
        if not importlib.util.find_spec("huggingface_hub"):
            raise UserError(f'--push={name!r} needs the package huggingface_hub: pip install "lmboost[hub]".')
        import huggingface_hub
        from huggingface_hub.errors import RepositoryNotFoundError

        if not huggingface_hub.get_token():
            raise UserError(f"--push={name!r}: there is no token of the Hub. {_TOKEN}.")
        api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        with _refusing(name):
            api.whoami()
            try:
                found = api.model_info(name)
            except RepositoryNotFoundError:
                return cls(name, public, api)
        if files := {sibling.rfilename for sibling in found.siblings or ()} - _EMPTY:
            raise UserError(
                f"--push={name!r} is taken: the repository has {len(files)} files, such as {min(files)}. Choose "
                "another name; what is there is not written over."
            )
        if found.private == public:
            is_, asked = ("private", "--public asks for a public one") if public else ("public", "--public is not set")
            raise UserError(f"--push={name!r}: the repository is {is_}, but {asked}: change one of them.")
        return cls(name, public, api)

    def fill(self, directory: pathlib.Path) -> str:
        """Makes the repository if it is not there, and sends all files of a directory in one commit; returns its URL.

        Raises a UserError where the Hub takes it not: then no file of it is in the repository.
        """
        with _refusing(self.name, f" {directory} is whole: `hf upload {self.name} {directory}` sends it, too."):
            self.api.create_repo(self.name, private=not self.public, exist_ok=True)
            sent = self.api.upload_folder(repo_id=self.name, folder_path=directory, commit_message="A model of lmboost")
        return sent.commit_url


@contextlib.contextmanager
def _refusing(name: str, after: str = "") -> Iterator[None]:
    """A UserError where the Hub refuses, or does not answer."""
    try:
        yield
    except Exception as error:  # of the HTTP library, of Xet's: each has its own
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            why = f"the Hub does not know the token. {_TOKEN}."
        elif status == 403:
            why = f"the token may not write to {name.partition('/')[0]}. {_TOKEN}, or choose another owner."
        else:
            why = f"the Hub cannot be reached or did not take it ({places.brief(error)}). Check the network, try again."
        raise UserError(f"--push={name!r}: {why}{after}") from error
