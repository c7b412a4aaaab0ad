"""How a run takes its place in a folder: an earlier one is there, as it was, until the new one has a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowfactor._files import replacing
from flowfactor.training.config import Config
from flowfactor.training.folder import (
    CONFIG,
    FIGURES,
    OF_A_RUN,
    OF_A_TRAINING,
    OF_TENSORBOARD,
    adopt,
    check_folder,
    claimed,
    holds_run,
    own,
    remove,
    resume_command,
    settle,
    sweep,
    write_text,
)
from flowfactor.training.identity import write_data


@dataclass
class Place:
    """The folder of a run in training.

    Attributes:
        folder: The folder.
        config: The settings.
        identity: What tells the data from others of the same name, by split.
        resume: Whether the run goes on with what is there.
        overwrite: Whether it may take the place of a run.
        kind: What the folder is called in its list.
        begun: Whether the folder holds a checkpoint of this run.
    """

    folder: Path
    config: Config
    identity: dict[str, Any]
    resume: bool
    overwrite: bool
    kind: str
    begun: bool = field(default=False, init=False)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Claims the folder and makes it ready; what goes wrong meanwhile says where, and how to go on.

        Raises:
            FileExistsError: If another process works there, or it holds a run, or what is not ours.
            OSError: If a file cannot be written.
            KeyboardInterrupt: After an interruption; it says how to go on.
        """
        self.begun = self.resume
        try:
            with claimed(self.folder):
                try:
                    self._enter()
                    yield
                finally:
                    settle(self.folder)
        except KeyboardInterrupt as error:
            if error.args:
                raise
            how = (
                f"Go on from the last checkpoint: {resume_command(self.folder, self.config.imports)}"
                if self.begun
                else "Nothing was saved"
            )
            raise KeyboardInterrupt(how) from None
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(self.folder)
            raise

    def _enter(self) -> None:
        # Again, since another process may have been at work there after this run was prepared.
        check_folder(self.folder, self.resume, self.overwrite)
        sweep(self.folder)
        if self.resume:
            adopt(self.folder)
            own(self.folder, *self._names, kind=self.kind)
            write_data(self.folder, self.identity)
            write_text(self.folder / CONFIG, self._settings())
        elif not holds_run(self.folder):
            own(self.folder, *OF_A_TRAINING)

    def begin(self) -> None:
        """Takes the place of an earlier run; to be called when the first checkpoint lies ready under a temporary name."""
        with replacing(self.folder / CONFIG) as temporary:
            temporary.write_text(self._settings(), encoding="utf-8")
            own(self.folder, *self._names, kind=self.kind)
            remove(self.folder, (*OF_A_RUN, FIGURES), keep=self._names)
            write_data(self.folder, self.identity)
        self.begun = True

    @property
    def _names(self) -> tuple[str, ...]:
        return (*OF_A_TRAINING, *(OF_TENSORBOARD if self.config.train.tensorboard else ()))

    def _settings(self) -> str:
        """The settings as YAML, with the place of the data as it is from any working directory."""
        values = self.config.as_dict()
        data = values["data"]
        for section, name in ((data, "root"), (data, "test_root"), (data["options"], "cache")):
            if isinstance(section.get(name), str):
                section[name] = str(Path(section[name]).expanduser().absolute())
        return Config.from_dict(values).as_yaml()
