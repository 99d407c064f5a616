"""Clients written for OpenAI's Responses API, before the whole service: the official ones in Python
and JavaScript, and openai-agents."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import agents
import pytest
from openai import AsyncOpenAI, BadRequestError, InternalServerError, NotFoundError, OpenAI
from pydantic import BaseModel

from tests import vocabularies
from tests.service import DEADLINE, Service, told

ASK = "Call get_weather with city Paris."
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather now",
    "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
RESULT = '{"temperature": 21}'


def test_an_answer_and_what_it_took(client: OpenAI) -> None:
    made = client.responses.create(model="tiny-oss", input="What is 17 + 25?")
    assert (made.output_text, made.status) == ("42", "completed")
    thought, said = made.output
    assert thought.type == "reasoning"
    assert thought.content
    assert said.type == "message"
    assert made.usage is not None
    assert 0 < made.usage.output_tokens_details.reasoning_tokens < made.usage.output_tokens


def test_a_stream_of_typed_events(client: OpenAI) -> None:
    whole = client.responses.create(model="tiny-oss", input="What is 17 + 25?")
    kinds: list[str] = []
    said = thought = ""
    with client.responses.stream(model="tiny-oss", input="What is 17 + 25?") as stream:
        for number, event in enumerate(stream):
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                said += event.delta
                assert event.snapshot == said
            elif event.type == "response.reasoning_text.delta":
                thought += event.delta
            assert event.sequence_number == number
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert (said, final.output_text) == ("42", "42")
    first = whole.output[0]
    assert first.type == "reasoning"
    assert first.content
    assert thought == first.content[0].text
    assert client.responses.retrieve(final.id).output_text == "42", "kept before the stream ended"


def test_a_tools_loop_by_the_store(client: OpenAI) -> None:
    first = client.responses.create(model="tiny-oss", input=ASK, tools=[TOOL])
    call = first.output[-1]
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    last = client.responses.create(
        model="tiny-oss", input=[result], tools=[TOOL], previous_response_id=first.id
    )
    assert last.output_text == "The temperature is 21."
    back: Any = [{"role": "user", "content": ASK}, *first.output, result]
    stateless = client.responses.create(model="tiny-oss", input=back, tools=[TOOL], store=False)
    assert stateless.output_text == last.output_text
    assert stateless.usage is not None
    assert last.usage is not None
    assert stateless.usage.input_tokens == last.usage.input_tokens
    with pytest.raises(NotFoundError):
        client.responses.retrieve(stateless.id)
    client.responses.delete(first.id)
    with pytest.raises(NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(BadRequestError):
        client.responses.create(model="tiny-oss", input="a", previous_response_id=last.id)


def test_log_probabilities_of_what_is_said(client: OpenAI) -> None:
    asked: Any = {
        "model": "tiny-oss",
        "input": "Spell sun.",
        "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
    }
    made = client.responses.create(**asked)
    said = made.output[-1]
    assert said.type == "message"
    (part,) = said.content
    assert part.type == "output_text"
    assert part.logprobs
    assert "".join(one.token for one in part.logprobs) == part.text == "s-u-n"
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)
    deltas = []
    for event in client.responses.create(**asked, stream=True):
        if event.type == "response.output_text.delta":
            deltas += event.logprobs
    assert [(one.token, one.logprob) for one in deltas] == [
        (one.token, one.logprob) for one in part.logprobs
    ]


class Person(BaseModel):
    name: str
    age: int


def test_an_answer_in_a_form(client: OpenAI) -> None:
    question = "Make a JSON object with name Tom and age 12."
    made = client.responses.parse(model="tiny-oss", input=question, text_format=Person)
    assert made.output_parsed == Person(name="Tom", age=12)
    with client.responses.stream(model="tiny-oss", input=question, text_format=Person) as stream:
        assert stream.get_final_response().output_parsed == made.output_parsed
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(
            model="tiny-oss",
            input=question,
            text={"format": {"type": "json_schema", "name": "n", "schema": {"not": {}}}},
        )
    assert caught.value.param == "text.format"
    forced = client.responses.create(
        model="tiny-oss",
        input="What is 17 + 25?",
        tools=[TOOL | {"strict": True}],
        tool_choice={"type": "function", "name": "get_weather"},
        max_output_tokens=200,
    )
    assert [item.type for item in forced.output if item.type != "reasoning"] == ["function_call"]


def test_many_at_once_and_one_that_leaves(service: Service) -> None:
    async def run() -> None:
        async with AsyncOpenAI(
            base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE
        ) as client:

            async def ask(a: int) -> str:
                question = f"What is {a} + 25?"
                return (await client.responses.create(model="tiny-oss", input=question)).output_text

            async def leave() -> None:
                stream = await client.responses.create(
                    model="tiny-oss", input="hello", stream=True, extra_body={"ignore_eos": True}
                )
                async for event in stream:
                    if event.type == "response.output_text.delta":
                        break
                await stream.close()

            answers, _ = await asyncio.gather(
                asyncio.gather(*[ask(a) for a in range(10, 20)]), leave()
            )
            assert answers == [str(a + 25) for a in range(10, 20)]

    asyncio.run(run())
    service.until(lambda: service.metric("moeray_num_requests_running") == 0)
    service.until(lambda: service.metric("moeray_kv_blocks_used") == 0)


def test_responses_outlive_the_stores_process(service: Service, client: OpenAI) -> None:
    made = client.responses.create(model="tiny-oss", input="What is 17 + 25?")
    lines = told(service.family(), lambda process: (process, " ".join(process.cmdline())))
    (actor,) = [process for process, line in lines if "ray::Store" in line]
    actor.kill()
    actor.wait(DEADLINE)

    def there() -> bool:
        try:
            return client.responses.retrieve(made.id).output_text == "42"
        except InternalServerError as error:
            if error.status_code != 503:  # it may take a while to start again
                raise
            return False

    service.until(there)
    after = client.responses.create(
        model="tiny-oss", input="Spell sun.", previous_response_id=made.id
    )
    assert client.responses.retrieve(after.id).output_text == "s-u-n"


@pytest.mark.parametrize("kind", [agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel])
def test_an_agent_uses_its_tool(service: Service, kind: Any) -> None:
    asked: list[str] = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """Weather now"""
        asked.append(city)
        return RESULT

    async def run() -> str:
        async with AsyncOpenAI(
            base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE
        ) as client:
            agent = agents.Agent(
                name="tiny", model=kind(model="tiny-oss", openai_client=client), tools=[get_weather]
            )
            config = agents.RunConfig(tracing_disabled=True)
            done = await agents.Runner.run(agent, ASK, max_turns=3, run_config=config)
            return str(done.final_output)

    assert asyncio.run(run()) == "The temperature is 21."
    assert asked == ["Paris"]


SCRIPT = """
import OpenAI from %s;
import assert from "node:assert/strict";
const client = new OpenAI({baseURL: process.argv[2], apiKey: "none", maxRetries: 0});
const model = "tiny-oss", question = "What is 17 + 25?";
const messages = [{role: "user", content: question}];
const chat = await client.chat.completions.create({model, messages});
assert.equal(chat.choices[0].message.content, "42");
const runner = client.chat.completions.stream({model, messages});
assert.equal(await runner.finalContent(), "42");
let said = "";
for await (const event of await client.responses.create({model, input: question, stream: true}))
  if (event.type === "response.output_text.delta") said += event.delta;
assert.equal(said, "42");
const stream = client.responses.stream({model, input: %s, tools: [%s]});
const called = await stream.finalResponse();
const call = called.output.at(-1);
assert.deepEqual(JSON.parse(call.arguments), {city: "Paris"});
const result = {type: "function_call_output", call_id: call.call_id, output: %s};
const last = await client.responses.create(
  {model, input: [result], tools: [%s], previous_response_id: called.id});
assert.equal(last.output_text, "The temperature is 21.");
assert.equal((await client.responses.retrieve(last.id)).output_text, last.output_text);
await client.responses.delete(last.id);
await assert.rejects(client.responses.retrieve(last.id), OpenAI.NotFoundError);
"""


def test_the_javascript_client(service: Service, tmp_path: Path) -> None:
    vocabularies.require()
    module = vocabularies.JAVASCRIPT / "index.mjs"
    script = tmp_path / "client.mjs"
    parts = (str(module), ASK, TOOL, RESULT, TOOL)
    script.write_text(SCRIPT % tuple(json.dumps(part) for part in parts))
    done = subprocess.run(
        ["node", str(script), f"{service.url}/v1"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_file_of_responses_outlives_the_service(tmp_path: Path) -> None:
    file, made = tmp_path / "responses.db", ""
    for life in ("first", "second"):
        (tmp_path / life).mkdir()
        service = Service(tmp_path / life, "--device", "cpu", "--response-store", str(file))
        try:
            service.wait_until_ready()
            with OpenAI(base_url=f"{service.url}/v1", api_key="none", timeout=DEADLINE) as one:
                made = made or one.responses.create(model="tiny-oss", input="What is 17 + 25?").id
                assert one.responses.retrieve(made).output_text == "42"
        finally:
            assert service.stop() == 0, service.said()
    assert file.stat().st_mode & 0o777 == 0o600
