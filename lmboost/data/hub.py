"""Corpora of the Hugging Face Hub by name: which files of which commit hold their documents, and their licence.

`hub:NAME` is one of `NAMES`, `hub:USER/NAME` any other whose documents are text, lines of JSON or Parquet. Nothing is
downloaded but what is read: the files are opened where they are, as of one commit.
"""

import dataclasses
import functools
import importlib.util
import urllib.parse

from lmboost import places
from lmboost.errors import UserError, nearest

PREFIX = "hub:"
_OPTIONS = ("config", "split")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus of `NAMES`, whose documents are the field "text".

    Attributes:
      repository: of the Hub.
      licence: by the repository's card, unless it says whose; texts in it may have others.
      config: the part that is read; "" for the repository's default.
    """

    repository: str
    licence: str
    config: str = ""


NAMES = {
    "c4": Corpus("allenai/c4", "odc-by", "en"),
    "climbmix": Corpus("OptimalScale/ClimbMix", "cc-by-nc-4.0 (of nvidia/Nemotron-ClimbMix, whose tokens it decodes)"),
    "fineweb": Corpus("HuggingFaceFW/fineweb", "odc-by", "sample-10BT"),
    "fineweb-edu": Corpus("HuggingFaceFW/fineweb-edu", "odc-by", "sample-10BT"),
    "openwebtext": Corpus("Skylion007/openwebtext", "cc0-1.0"),
    "pile-deduplicated": Corpus("EleutherAI/the_pile_deduplicated", "other"),
    "pile-uncopyrighted": Corpus("monology/pile-uncopyrighted", "other"),
}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a source is: files, as fsspec opens them, of one commit."""

    repository: str
    commit: str
    config: str
    split: str
    licence: str
    paths: tuple[str, ...]

    @property
    def origin(self) -> dict[str, str]:
        """What a manifest keeps of it."""
        return {field: getattr(self, field) for field in ("repository", "commit", "config", "split", "licence")}

    def __str__(self) -> str:
        return (
            f"{self.repository} at commit {self.commit}, config {self.config}, split {self.split}: {len(self.paths):,} "
            f"files, licence {self.licence}"
        )


@functools.lru_cache
def find(source: str) -> Found:
    """What `hub:NAME[@REVISION][?config=...&split=train]` is now; asked once in a process.

    Raises a UserError where the name, revision, config or split is not known, the Hub can't be reached, or the package
    that knows how repositories are laid out is not there.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    name, _, revision = name.partition("@")
    options = dict(urllib.parse.parse_qsl(query))
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise UserError(
            f"source={source!r}: option {unknown[0]!r} is not known{nearest(unknown[0], _OPTIONS)}, expected "
            f"{' or '.join(_OPTIONS)}."
        )
    known = NAMES.get(name)
    if not known and name.count("/") != 1:
        raise UserError(
            f"source={source!r} is not known{nearest(name, NAMES)}: expected hub:USER/NAME, or one of "
            f"{', '.join(PREFIX + name for name in NAMES)}."
        )
    if not importlib.util.find_spec("datasets"):
        raise UserError(f'source={source!r} needs the package datasets: pip install "lmboost[datasets]".')
    known = known or Corpus(name, "")
    return _ask(source, known, revision or None, options.get("config", known.config), options.get("split", "train"))


def _ask(source: str, corpus: Corpus, revision: str | None, config: str, split: str) -> Found:
    import datasets  # only where the Hub is asked for: it is not always there, and its import is slow
    import huggingface_hub

    try:
        about = huggingface_hub.HfApi().dataset_info(corpus.repository, revision=revision)
        builder = datasets.load_dataset_builder(corpus.repository, config or None, revision=about.sha)
    except Exception as error:  # of the network, the Hub and the library, each has its own
        raise UserError(
            f"source={source!r}: the Hub does not give {corpus.repository} ({places.brief(error)}). Mend the name, "
            "revision, config or network; of a gated one accept its terms and log in (hf auth login)."
        ) from error
    there = builder.config.data_files or {}
    if split not in there:
        raise UserError(
            f"source={source!r}: config {builder.config.name!r} has no split {split!r}{nearest(split, there)}, it has "
            f"{', '.join(map(str, there)) or 'none'}."
        )
    stated = about.card_data.get("license") if about.card_data else None
    licence = corpus.licence or (", ".join(stated) if isinstance(stated, list) else stated) or "not stated"
    return Found(corpus.repository, about.sha, builder.config.name, split, licence, tuple(sorted(there[split])))
