"""The first session in insitu, recorded and not run; its size as a request."""

import sys
import uuid

from _serve import serve

from insitu import LanguageModel
from insitu_proto.v1 import scheduler_service_pb2

model = LanguageModel(sys.argv[1])


def record(model=model):
    with model.session(run=False) as session:
        with model.trace("The Eiffel Tower is in the city of"):
            hidden = model.model.layers[29].output[0][:, -1, :]
            model.lm_head.output.argmax(dim=-1).save()
        with model.trace("Buckingham Palace is in the city of"):
            model.model.layers[1].output[0][:, -1, :] = hidden[:]
            model.lm_head.output.argmax(dim=-1).save()
    return session


def num_bytes():
    request = scheduler_service_pb2.SubmitSessionRequest(
        request_id=str(uuid.uuid4()), session=record()._recorder.session
    )
    return request.ByteSize()


def locations():
    request = record()._recorder.session
    return sum(location.ByteSize() for location in request.locations)


def record_first():
    """Records it on a model object that has its tokenizer and nothing else yet."""
    fresh = LanguageModel(sys.argv[1])
    fresh.__dict__["tokenizer"] = model.tokenizer
    record(fresh)


serve(
    num_bytes=num_bytes,
    locations=locations,
    record=lambda: record() and None,
    record_first=record_first,
)
