"""The exceptions of hf_reflect: each message says what was found, why it cannot work, and what to change.

ReflectError                    everything below; a recipe prints its message without a traceback
├── DataError (ValueError)      the data, or how it was described
├── SettingsError (ValueError)  an argument, or arguments that do not go together
├── TeacherError (RuntimeError) the endpoint cannot be used, or too many replies are unusable
│   └── BudgetExceeded          a limit of the ledger was reached and `on_budget="raise"`
└── HubError (RuntimeError)     the Hub does not let us, or cannot be reached; what was there is as it was
"""


class ReflectError(Exception):
    """Something its user can mend; the message says how."""


class DataError(ReflectError, ValueError):
    """The data cannot be used as it is."""


class SettingsError(ReflectError, ValueError):
    """An argument is out of range, or contradicts another."""


class TeacherError(ReflectError, RuntimeError):
    """Asking stopped. Every reply that arrived before is in the ledger."""


class BudgetExceeded(TeacherError):
    """A limit on requests, tokens or money was reached."""


class HubError(ReflectError, RuntimeError):
    """The Hub does not let us read or write, or cannot be reached; what is there is as it was."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM while a teacher was asked: what came back is in the ledger, and it was said how to go on."""

    def __init__(self, number: int):
        super().__init__("asking was interrupted")
        self.number = number
