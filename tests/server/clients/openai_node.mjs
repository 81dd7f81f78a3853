// The ten turns of an agent through openai's library for Node: node openai_node.mjs ADDRESS TURNS_FILE
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const [address, file] = process.argv.slice(2);
const turns = JSON.parse(readFileSync(file, "utf8"));
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 });
const tools = turns.tools.map((tool) => ({ type: "function", function: tool }));
const history = [{ role: "system", content: turns.system }];

// Ask, streamed unless told otherwise; print what came, and keep it in the history of the chat.
async function ask(turn, { messages, stream = true, ...body } = {}) {
  const asked = { model: "any", messages: messages ?? history, temperature: 0, max_tokens: turns.limit, ...body };
  let reply;
  let thought = "";
  if (stream) {
    const runner = client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
    runner.on("chunk", ({ choices: [choice] }) => (thought += choice?.delta.reasoning_content ?? ""));
    reply = await runner.finalChatCompletion();
  } else {
    reply = await client.chat.completions.create(asked);
  }
  const [{ message, finish_reason }] = reply.choices;
  const calls = (message.tool_calls ?? []).map((call) => ({
    id: call.id,
    name: call.function.name,
    arguments: JSON.parse(call.function.arguments),
  }));
  const line = {
    turn,
    text: message.content ?? "",
    reasoning: thought,
    calls,
    finish: finish_reason,
    prompt: reply.usage.prompt_tokens,
    cached: reply.usage.prompt_tokens_details.cached_tokens,
  };
  console.log(JSON.stringify(line));
  if (!messages) history.push({ ...message, reasoning_content: thought || undefined, reasoning: undefined });
  return message;
}

const say = (text) => history.push({ role: "user", content: text });
const results = (message) =>
  message.tool_calls.forEach((call, i) =>
    history.push({ role: "tool", tool_call_id: call.id, content: turns.results[i % turns.results.length] }),
  );

say("hello");
await ask("hello", { tools, stream: false });
say("weather in Oslo?");
results(await ask("call", { tools, tool_choice: { type: "function", function: { name: "weather" } } }));
await ask("result", { tools });
say("and read the file");
results(await ask("calls", { tools, tool_choice: "required", ...turns.two_calls }));
await ask("results", { tools });
say("sum up as JSON");
const json_schema = { name: "summary", schema: turns.schema, strict: true };
await ask("schema", { tools, response_format: { type: "json_schema", json_schema } });
say("spell the alphabet up to l");
await ask("stop", { tools, stop: ["m"] });
await ask("title", { messages: [{ role: "user", content: `A title for: ${turns.system}` }], max_tokens: 8 });
say("think");
await ask("think", { tools, reasoning_effort: "high" });
say("and now without");
await ask("after", { tools, reasoning_effort: "none" });
try {
  await ask("error", { temperature: -1 });
} catch (error) {
  if (!(error instanceof OpenAI.BadRequestError)) throw error;
  console.log(JSON.stringify({ turn: "error", status: error.status, message: error.message, param: error.param }));
}
await ask("long", { messages: [{ role: "user", content: turns.long }] });
