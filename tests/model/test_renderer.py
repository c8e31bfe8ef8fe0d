"""Chat templates of adapters: rendered as the base's are, and bounded, for they are programs from a file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pytest
from loramux.errors import InvalidAdapter, InvalidRequest
from loramux.model.renderer import TemplateRenderer
from transformers.utils.chat_template_utils import render_jinja_template

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<b>"}, {"role": "user", "content": "?"}]
GOOD = "{{ bos_token }}{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}### assistant:"
# A child that gives conversations less time than usual.
HASTY = "from loramux.model import template_child; template_child.CPU_SECONDS = 0.3; template_child.main()"
HOSTILE = {
    "a loop without an end": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a huge string": "{{ 'x' * 10**10 }}",
    "a huge number": "{{ (10 ** (10 ** 9)) % 7 }}",
    "a huge answer": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer({"bos_token": "<s>"})
    yield renderer
    renderer.close()


@pytest.fixture(scope="module")
def hasty() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer({"bos_token": "<s>"}, (sys.executable, "-c", HASTY))
    yield renderer
    renderer.close()


@pytest.mark.parametrize(
    "template",
    [
        GOOD,
        "{%- for m in messages %}\n {{- m.content|tojson }}{% if loop.first %}{% continue %}{% endif %}!{% endfor %}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ add_generation_prompt }}{{ tools is none }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
def test_it_renders_as_transformers_does(renderer: TemplateRenderer, template: str) -> None:
    (wanted,), _ = render_jinja_template([TURNS], chat_template=template, add_generation_prompt=True, bos_token="<s>")
    renderer.check(template)
    assert renderer.render(template, TURNS) == wanted


@pytest.mark.parametrize("template", ["{% for %}", "{{ x", "{% nothing %}"])
def test_what_is_no_template_is_refused_at_load(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(InvalidAdapter, match="is no template"):
        renderer.check(template)


def test_a_template_that_wants_other_turns_is_a_template(renderer: TemplateRenderer) -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}ok"
    renderer.check(template)
    with pytest.raises(InvalidRequest, match="system first"):
        renderer.render(template, TURNS)
    assert renderer.render(template, [{"role": "system", "content": ""}]) == "ok"


@pytest.mark.parametrize(
    "template", ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}"]
)
def test_the_sandbox_is_transformers_own(renderer: TemplateRenderer, template: str) -> None:
    try:
        text = renderer.render(template, TURNS)
    except InvalidRequest:
        return
    assert "class" not in text


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_is_refused_and_harms_no_other(hasty: TemplateRenderer, template: str) -> None:
    with pytest.raises(InvalidRequest):
        hasty.render(template, TURNS)
    with contextlib.suppress(InvalidAdapter):  # some would not be noticed at load
        hasty.check(template)
    assert hasty.render(GOOD, TURNS).startswith("<s>### user: Hi")
