"""Valid sessions of many kinds, to be changed by fuzzing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import insitu
from insitu._session_file import read_session

if TYPE_CHECKING:
    from pathlib import Path

    from insitu import LanguageModel
    from insitu_proto.v1.session_pb2 import Session

_IDS = [5, 9, 17, 23]


def seed_sessions(model: LanguageModel, folder: Path) -> list[Session]:
    """Records them; the model's name becomes "tiny"."""
    recorded = [record(model) for record in (_reads, _writes, _flow, _brings, _gradients)]
    sessions = []
    for number, session in enumerate(recorded):
        session.save(folder / f"{number}.session")
        found = read_session(folder / f"{number}.session")
        _rename(found)
        sessions.append(found)
    return sessions


def _reads(model: LanguageModel) -> insitu.Session:
    with model.session(run=False) as session:
        with model.trace(_IDS):
            hidden = model.model.layers[1].output[0]
            hidden[:, -1].softmax(-1).topk(2).values.save()
            session.log("norm", hidden.norm())
        with model.trace(_IDS):
            model.lm_head.output[:, -1].argmax(-1).save()
    return session


def _writes(model: LanguageModel) -> insitu.Session:
    with model.session(run=False) as session:
        with model.trace(_IDS):
            kept = model.model.layers[0].output[0]
        with model.trace([_IDS, _IDS]):
            model.model.layers[1].output[0][:, 1:3] = kept[:, :2] * 0.5
            model.model.layers[2].output[0].mean(dim=(0, 1)).save()
    return session


def _flow(model: LanguageModel) -> insitu.Session:
    with model.session(run=False) as session:
        norms = insitu.list().save()
        with session.iter([1, 2]) as factor:
            with model.trace(_IDS):
                model.model.layers[0].output[0][:] = model.model.layers[0].output[0] * factor
                norms.append(model.model.layers[1].output[0].norm())
    return session


def _brings(model: LanguageModel) -> insitu.Session:
    direction = torch.arange(64.0)
    with model.session(run=False) as session:
        with model.trace(_IDS):
            model.model.layers[1].output[0][:, -1] += direction
            (model.model.layers[2].output[0] @ direction).save()
    return session


def _gradients(model: LanguageModel) -> insitu.Session:
    with model.session(run=False) as session:
        with model.trace(_IDS):
            hidden = model.model.layers[1].output[0]
            loss = model.lm_head.output[0, -1, 7]
            loss.backward()
            hidden.grad.norm().save()
    return session


def _rename(session: Session) -> None:
    from insitu_wire.steps import all_steps

    for step in all_steps(session.steps):
        if step.HasField("trace"):
            step.trace.model = "tiny"
        if step.compute.model:
            step.compute.model = "tiny"
