"""Everything that nasplat raises on purpose.

Each message says what was asked, what was got and what would be legal.

::

    NasplatError
    ├── InvalidInputError (ValueError)      an argument, a gene, a metric name
    │   ├── ArchitectureError               genes that the space does not have
    │   ├── UnknownMetricError              an objective or constraint that nothing provides
    │   └── UnknownPluginError (LookupError) a name that no installed package claims
    ├── UnsupportedError                    the object cannot do this at all (a space without a supernet)
    ├── FolderError                         a study's folder cannot be used as asked
    │   ├── FolderInUseError                another live process holds it
    │   ├── FolderMismatchError             it belongs to another space, strategy, task or seed
    │   └── JournalError                    its journal cannot be read
    ├── CandidateError                      one candidate failed; the search goes on
    │   ├── NonFiniteError                  NaN or infinity
    │   └── TimeLimitError                  past its time limit
    ├── ExportError                         an exported file does not compute what the model computes
    └── FileFormatError                     a file is not what it claims to be, or is damaged

    NasplatWarning (UserWarning)            worth knowing; nothing was lost
    SearchInterrupted (KeyboardInterrupt)   Ctrl-C; everything finished so far is in the folder
"""

from __future__ import annotations


class NasplatError(Exception):
    """Base of every error that nasplat raises on purpose."""


class InvalidInputError(NasplatError, ValueError):
    """An argument is outside what is legal; the message lists what is."""


class ArchitectureError(InvalidInputError):
    """Genes do not name a legal architecture of the space."""


class UnknownMetricError(InvalidInputError):
    """An objective or constraint names a metric that nothing provides."""


class UnknownPluginError(InvalidInputError, LookupError):
    """No installed package claims this plug-in name; the message lists the installed ones."""


class UnsupportedError(NasplatError):
    """The object cannot do what was asked, whatever the arguments."""


class FolderError(NasplatError):
    """A study's folder cannot be used as asked. Nothing in it was changed."""


class FolderInUseError(FolderError):
    """Another live process holds the folder."""


class FolderMismatchError(FolderError):
    """The folder belongs to another space, strategy, task or seed."""


class JournalError(FolderError):
    """The folder's journal cannot be read."""


class CandidateError(NasplatError):
    """One candidate failed. It becomes a failed trial and the search goes on."""


class NonFiniteError(CandidateError):
    """A loss or a metric became NaN or infinite."""


class TimeLimitError(CandidateError):
    """A candidate ran past its time limit."""


class ExportError(NasplatError):
    """An exported file, loaded again, does not compute what the model computes."""


class FileFormatError(NasplatError):
    """A file is not what it claims to be, or is damaged."""


class NasplatWarning(UserWarning):
    """Worth knowing; nothing was lost."""


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C during a search. What had finished is in the folder; the message says how to go on."""
