// The ten turns of an agent through @earendil-works/pi-ai, as OpenClaw asks them: node pi_ai.mjs ADDRESS TURNS_FILE
import { readFileSync } from "node:fs";
import { stream } from "@earendil-works/pi-ai";

const [address, file] = process.argv.slice(2);
const turns = JSON.parse(readFileSync(file, "utf8"));
const model = {
  id: "any",
  name: "any",
  api: "openai-completions",
  provider: "local",
  baseUrl: `${address}/v1`,
  reasoning: true,
  thinkingLevelMap: { off: "none" },
  input: ["text"],
  cost: { input: 0, output: 0, cacheRead: 0, cacheWrite: 0 },
  contextWindow: 32768,
  maxTokens: turns.limit,
};
const history = [];

// Ask; print what came, and keep it in the history of the chat. `more` goes into the body as it is.
async function ask(turn, { messages, tools = turns.tools, more = {}, ...options } = {}) {
  const context = { systemPrompt: turns.system, messages: messages ?? history, tools };
  const onPayload = (body) => ({ ...body, ...more });
  const settings = { apiKey: "none", temperature: 0, maxTokens: turns.limit, maxRetries: 0, onPayload, ...options };
  const reply = await stream(model, context, settings).result();
  if (reply.stopReason === "error") throw new Error(reply.errorMessage);
  const of = (kind) => reply.content.filter((block) => block.type === kind);
  const calls = of("toolCall").map((call) => ({ id: call.id, name: call.name, arguments: call.arguments }));
  const { input, cacheRead, cacheWrite } = reply.usage;
  const line = {
    turn,
    text: of("text").map((block) => block.text).join(""),
    reasoning: of("thinking").map((block) => block.thinking).join(""),
    calls,
    finish: reply.stopReason,
    prompt: input + cacheRead + cacheWrite,
    cached: cacheRead,
  };
  console.log(JSON.stringify(line));
  if (!messages) history.push(reply);
  return calls;
}

const user = (text) => ({ role: "user", content: text, timestamp: Date.now() });
const say = (text) => history.push(user(text));
const results = (calls) =>
  calls.forEach((call, i) =>
    history.push({
      role: "toolResult",
      toolCallId: call.id,
      toolName: call.name,
      content: [{ type: "text", text: turns.results[i % turns.results.length] }],
      isError: false,
      timestamp: Date.now(),
    }),
  );

say("hello");
await ask("hello");
say("weather in Oslo?");
results(await ask("call", { toolChoice: { type: "function", function: { name: "weather" } } }));
await ask("result");
say("and read the file");
results(await ask("calls", { toolChoice: "required", more: turns.two_calls }));
await ask("results");
say("sum up as JSON");
const json_schema = { name: "summary", schema: turns.schema, strict: true };
await ask("schema", { more: { response_format: { type: "json_schema", json_schema } } });
say("spell the alphabet up to l");
await ask("stop", { more: { stop: ["m"] } });
await ask("title", { messages: [user("A title for this chat")], tools: [], maxTokens: 8 });
say("think");
await ask("think", { reasoningEffort: "high" });
say("and now without");
await ask("after");
try {
  await ask("error", { temperature: -1 });
} catch (error) {
  const [status] = error.message.match(/\d+/);
  console.log(JSON.stringify({ turn: "error", status: Number(status), message: error.message }));
}
await ask("long", { messages: [user(turns.long)], tools: [] });
