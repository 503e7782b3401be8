"""Chat templates: no message is lost in silence, and no template takes a machine's time or memory."""

import os
import signal

import pytest

from kvjax.errors import InputError
from kvjax.models import chat_template
from kvjax.models.chat_template import Template

PARTS = """{% for m in messages -%}
[{{ m.role }}]
{%- for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}
{%- endfor %}"""
USER = [{"role": "user", "content": ' What is\n"the" capital? '}]


def test_a_template_that_reads_parts_is_given_parts():
    template = Template(PARTS, {})
    assert template.render(USER) == '[user] What is\n"the" capital? '
    assert template.render([{"role": "user", "content": [{"type": "text", "text": "so"}]}]) == "[user]so"


@pytest.mark.parametrize("shown", ["{{ m.content | trim }}", "{{ m.content | tojson }}"])
def test_words_may_be_stripped_or_quoted(shown):
    Template(f"{{% for m in messages %}}{shown}{{% endfor %}}", {}).render(USER)


def test_no_message_is_lost_in_silence():
    with pytest.raises(InputError, match="leaves out what a user says"):
        Template("Hello!", {}).render(USER)
    last = Template("{{ messages[-1].content }}", {})
    assert last.render([{"role": "assistant", "content": "<think>"}, *USER]).strip().startswith("What")
    for role in ("user", "system"):
        with pytest.raises(InputError, match="leaves out or changes the text of message 1"):
            last.render([{"role": role, "content": "first"}, *USER])
    with pytest.raises(InputError, match="changes the text of message 1"):
        Template("{{ messages[0].content | replace('c', '') }}", {}).render(USER)


ENDLESS = {
    "{{ 'a' * 10**10 }}": "too much memory",
    "{{ 'a' * 10**7 }}": "it makes 10,000,011 characters of",
    "{{ '%1000000000d' % 1 }}": "more than 1 s|too much memory",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}": "recursion",
    "{{ 10**(10**8) }}": "more than 1 s",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "more than 1 s",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}": "more than 1 s",
}


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_has_bounded_time_and_memory(source, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    with pytest.raises(InputError, match=ENDLESS[source]):
        Template(source + "{{ messages[0].content }}", {}).render(USER)


def test_a_template_goes_on_after_an_error_and_after_its_process_has_ended():
    template = Template(
        "{% if messages[0].content == 'no' %}{{ raise_exception('why') }}{% endif %}{{ messages[0].content }}", {}
    )
    assert template.render(USER) == USER[0]["content"]
    with pytest.raises(InputError, match="cannot show these messages: why"):
        template.render([{"role": "user", "content": "no"}])
    assert template.render(USER) == USER[0]["content"]
    assert template._process is not None
    os.kill(template._process.pid, signal.SIGKILL)
    template._process.wait()
    assert template.render(USER) == USER[0]["content"]


def test_a_template_without_a_reader_leaves_no_process():
    template = Template("{{ messages[0].content }}", {})
    template.render(USER)
    process = template._process
    del template
    assert process is not None and process.wait(5) == 0
