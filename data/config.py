"""The `data` section of a run: where the text comes from and how it becomes sequences of tokens."""

from dataclasses import dataclass, field
from typing import Any

from refreshkv.ranges import COUNT, Range, validate_numbers
from refreshkv.settings import SettingsError

PYTHON_STDLIB = "python-stdlib"
"""The `path` of the running Python's library sources, which need no download."""

PYTHON_PACKAGES = "python-packages"
"""The `path` of the running Python's library sources and those of all packages installed for it."""

NUMPY_TESTS = "numpy-tests"
"""The `path` of the installed NumPy's tests, which python-packages leaves out."""

GENERATED_TASKS = "tasks"
"""The `path` of sequences made from generated tasks."""

MIXTURE = "mixture"
"""The `path` of sequences out of other prepared folders."""

BUILT_IN = (PYTHON_STDLIB, PYTHON_PACKAGES, NUMPY_TESTS, GENERATED_TASKS, MIXTURE)

FILE_BUILDERS = ("arrow", "csv", "json", "parquet", "text", "xml")
"""Builders of `datasets` that need `data_files`."""

SMALLEST_VOCABULARY = 257
"""Tokens of a byte-level vocabulary without merges: the 256 bytes and the end of text."""

NUMBERS = {
    "row_length": Range(2, 1 << 27),  # a batch of the prepared file holds at least one sequence
    "max_documents": Range(1, 2**62),
    "train_vocabulary": Range(SMALLEST_VOCABULARY, 10_000_000),
    "max_train_rows": Range(1, 2**62),
    "task_examples": COUNT,
}
"""Range of the numbers of `DataConfig`."""

SHORTEST_FIM_ROW = 8
"""Tokens of a fill-in-the-middle sequence: four special tokens, and some text."""


@dataclass(frozen=True)
class HeldOut:
    """The groups of documents that are kept for validation and for testing; all others are for training."""

    validation: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if twice := sorted(set(self.validation) & set(self.test)):
            raise SettingsError(f"data.held_out names {twice[0]} both for validation and for test")


@dataclass(frozen=True)
class FimConfig:
    """`data.fim`: which documents become fill-in-the-middle sequences, and the tokens that mark the parts.

    Raises `SettingsError` for values outside their range, and for a token that is named twice.
    """

    prefix_token: str
    """The token before the text that precedes the gap, such as <fim_prefix>."""
    suffix_token: str
    """The token before the text that follows the gap."""
    middle_token: str
    """The token before the text that fills the gap."""
    share: float = 0.5
    """Share of documents (0 to 1), chosen by the hash of their text. The sequences of all others stay as they are."""
    fragment_length: int = 100
    """Mean characters of a fragment (>= 1). Each fragment becomes tokens by itself."""

    def __post_init__(self) -> None:
        validate_numbers(self, {"share": Range(0, 1), "fragment_length": COUNT}, "data.fim.")
        if len({*self.names}) < 3 or not all(self.names):
            raise SettingsError("data.fim: prefix_token, suffix_token and middle_token must be three different tokens")

    @property
    def names(self) -> tuple[str, str, str]:
        """The three tokens."""
        return self.prefix_token, self.suffix_token, self.middle_token


@dataclass(frozen=True)
class DataConfig:
    """Which text is prepared, how, and where. Raises `SettingsError` for values that cannot work together.

    Preparation needs exactly one of `tokenizer` and `train_vocabulary`; training and evaluation need neither.
    """

    folder: str = "rows/python-stdlib"
    """Folder of the prepared rows: launch/prepare.py writes it, training and evaluation read it."""
    path: str = PYTHON_STDLIB
    """The first argument of `datasets.load_dataset`: a builder (json, text, parquet, ...), a folder, or a Hub id. Or
    one of five that need no download: python-stdlib, the library sources of the running Python;
    python-packages, those and the sources of all installed packages, without tests; numpy-tests, the tests of the
    installed NumPy; tasks, prompts and answers of `tasks`; mixture, the sequences of `folders`."""
    name: str | None = None
    """The dataset's configuration, where it has several."""
    data_files: str | list[str] | dict[str, Any] | None = None
    """Files for a builder: a path or glob, a list of them, or a section split -> files."""
    split: str = "train"
    """The source's split that is read. Its documents are then split 80/10/10 by the hash of their text."""
    streaming: bool = False
    """Read the source without a copy on disk. The rows are the same."""
    text_column: str = "text"
    """The column that holds a document's text."""
    group_column: str | None = None
    """The column that names a document's group, such as its package or its author; python-packages has `package`. All
    documents of a group fall into one split, chosen by the hash of the group's name. Without it each document's own
    hash decides."""
    held_out: HeldOut | None = None
    """With group_column: which groups are for validation and which for testing, in place of the hash."""
    tokenizer: str | None = None
    """Folder or Hub id of the model's tokenizer."""
    tokenizer_revision: str | None = None
    """Branch, tag or commit of `tokenizer` on the Hub; null for its main branch."""
    trust_remote_code: bool = False
    """Run Python code that `tokenizer`, or the tokenizer of one of `folders`, brings along, which may do anything.
    Without it such a tokenizer is refused."""
    train_vocabulary: int | None = None
    """Without `tokenizer`: tokens of a byte-level BPE to train on the documents of the train split (>= 257)."""
    row_length: int = 1024
    """Tokens in a row (>= 2). Documents shorter than this give no row."""
    max_documents: int | None = None
    """Read at most this many documents, the first of the source (>= 1)."""
    max_train_rows: int | None = None
    """Stop reading after the document with which the train split has this many rows (>= 1). Of a mixture: at most this
    many rows of all folders together."""
    folders: list[str] | None = None
    """For path=mixture: folders of prepared rows of the same length and tokenizer. Each split gets equally many rows of
    each, in turn: as many as the folder with the fewest has in that split. No tokenizer is set."""
    tasks: dict[str, Any] | None = None
    """For path=tasks: by the name of each task (docs/tasks.md) a section of its settings, {} for the defaults. A row
    holds one example; the tasks take turns."""
    task_examples: int = 10_000
    """For path=tasks: examples in all splits together, one in each row (>= 1)."""
    fim: FimConfig | None = None
    """Make fill-in-the-middle sequences of some documents (`refreshkv.data.fim`); needs `tokenizer`."""

    def __post_init__(self) -> None:
        for key in ("folder", "path", "split", "text_column"):
            if not getattr(self, key):
                raise SettingsError(f"data.{key} must not be empty")
        validate_numbers(self, NUMBERS, "data.")
        if self.tokenizer_revision is not None and self.tokenizer is None:
            raise SettingsError("data.tokenizer_revision means nothing without data.tokenizer: set it too")
        if self.tasks is not None and self.path != GENERATED_TASKS:
            raise SettingsError(
                f"data.tasks means nothing for data.path={self.path}: leave it out or set data.path=tasks"
            )
        if self.folders is not None and self.path != MIXTURE:
            raise SettingsError(
                f"data.folders means nothing for data.path={self.path}: leave it out or set data.path={MIXTURE}"
            )
        if self.held_out is not None and self.group_column is None:
            raise SettingsError("data.held_out names groups of documents: set data.group_column too")
        if self.fim is not None:
            self._validate_fim()
        if self.path in BUILT_IN:
            self._validate_nothing_ignored()
        elif self.path in FILE_BUILDERS and not self.data_files:
            raise SettingsError(f"data.path={self.path} reads files of yours: name them in data.data_files")

    def _validate_fim(self) -> None:
        if self.path in (GENERATED_TASKS, MIXTURE):
            raise SettingsError(
                f"data.fim means nothing for data.path={self.path}: leave it out or set it where documents are prepared"
            )
        if self.train_vocabulary is not None:
            raise SettingsError(
                "data.fim needs a tokenizer that has its tokens: set data.tokenizer in place of data.train_vocabulary"
            )
        if self.row_length < SHORTEST_FIM_ROW:
            raise SettingsError(
                f"data.row_length={self.row_length} is too short for data.fim: raise it to {SHORTEST_FIM_ROW} or more"
            )

    def _validate_nothing_ignored(self) -> None:
        unused = [("name", None), ("data_files", None), ("split", "train")]
        if self.path == GENERATED_TASKS:
            unused += [("train_vocabulary", None), ("max_documents", None), ("max_train_rows", None)]
            unused += [("group_column", None)]
            if not self.tasks:
                raise SettingsError("data.path=tasks: name the tasks in data.tasks, such as data.tasks.chain_of_key={}")
        if self.path == MIXTURE:
            unused += [("tokenizer", None), ("train_vocabulary", None), ("max_documents", None), ("group_column", None)]
            self._validate_folders()
        for key, unset in unused:
            if getattr(self, key) != unset:
                raise SettingsError(
                    f"data.{key} means nothing for data.path={self.path}: leave it out or set data.path too"
                )

    def _validate_folders(self) -> None:
        folders = self.folders or []
        if len(set(folders)) < max(2, len(folders)):
            raise SettingsError("data.path=mixture: name two or more different folders of rows in data.folders")
        if self.max_train_rows is not None and self.max_train_rows < len(folders):
            raise SettingsError(
                f"data.max_train_rows={self.max_train_rows} is less than the {len(folders)} folders of data.folders, "
                "each of which gives equally many: raise it"
            )
