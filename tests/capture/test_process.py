"""A trace is silent in its own thread, and other threads keep their log, their prints and their warnings."""

from __future__ import annotations

import logging
import threading
import warnings

import pytest
import torch
from torch.export import _trace

from turbocompile.capture.process import process_kept, quiet


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def say(words, warned):
    """Logs, prints and warns as export does."""
    logging.getLogger("torch.export").error(words)
    getattr(_trace, "print", print)(words)
    try:
        warnings.warn(words, UserWarning, stacklevel=1)
    except UserWarning as error:
        warned.append(str(error))


@pytest.fixture
def heard():
    handler, logger = Lines(), logging.getLogger("torch.export")
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


def test_quiet_silences_its_own_thread_alone(heard, capsys):
    warned = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = warnings.filters[:]
        with quiet():
            say("mine", warned)
            other = threading.Thread(target=say, args=("another's", warned))
            other.start()
            other.join()
        assert warnings.filters[:] == before
        say("mine again", warned)
    assert heard == warned == ["another's", "mine again"]
    assert capsys.readouterr().out.split("\n")[:-1] == heard


def test_quiet_ends_with_an_error(heard):
    before = warnings.filters[:]
    with pytest.raises(ValueError, match="wrong"), quiet():
        raise ValueError("wrong")
    assert warnings.filters[:] == before
    assert not hasattr(_trace, "print")
    logging.getLogger("torch.export").error("heard")
    assert heard == ["heard"]


def test_filters_that_another_thread_copied_meanwhile_hide_nothing():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet():
            copied = warnings.filters[:]
        warnings.filters[:] = copied
        warnings.warn("said", UserWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["said"]


def test_settings_and_random_states_are_put_back_however_the_body_ends():
    def change():
        torch.manual_seed(123)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        raise ValueError("wrong")

    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="wrong"), process_kept():
        change()
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
