"""What tests of the façade share: greedy parameters, and answers without their metrics."""

from __future__ import annotations

from typing import Any

from pace.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def answers(outputs: list[Any]) -> list[Any]:
    return [(o.outputs[0].token_ids, o.outputs[0].text, o.outputs[0].finish_reason) for o in outputs]
