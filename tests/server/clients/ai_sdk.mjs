// The ten turns of an agent through @ai-sdk/openai-compatible, as OpenCode asks them: node ai_sdk.mjs ADDRESS FILE
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, jsonSchema, Output, streamText, tool } from "ai";

const [address, file] = process.argv.slice(2);
const turns = JSON.parse(readFileSync(file, "utf8"));
const provider = createOpenAICompatible({
  name: "local",
  baseURL: `${address}/v1`,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider.chatModel("any");
const tools = Object.fromEntries(
  turns.tools.map(({ name, description, parameters }) => [
    name,
    tool({ description, inputSchema: jsonSchema(parameters) }),
  ]),
);
const history = [];

// Ask, streamed unless told otherwise; print what came, and keep it in the history of the chat.
async function ask(turn, { messages, stream = true, ...more } = {}) {
  const asked = {
    model,
    system: turns.system,
    messages: messages ?? history,
    temperature: 0,
    maxOutputTokens: turns.limit,
    maxRetries: 0,
    ...more,
  };
  let failure;
  const result = stream
    ? streamText({ ...asked, onError: ({ error }) => (failure = error) })
    : await generateText(asked);
  if (stream) await result.consumeStream();
  if (failure) throw failure;
  const usage = await result.usage;
  const calls = (await result.toolCalls).map((call) => ({
    id: call.toolCallId,
    name: call.toolName,
    arguments: call.input,
  }));
  const line = {
    turn,
    text: await result.text,
    reasoning: (await result.reasoningText) ?? "",
    calls,
    finish: await result.finishReason,
    prompt: usage.inputTokens,
    cached: usage.inputTokenDetails.cacheReadTokens,
  };
  console.log(JSON.stringify(line));
  if (more.output) await result.output; // raises where it does not keep to the schema
  if (!messages) history.push(...(await result.response).messages);
  return calls;
}

const say = (text) => history.push({ role: "user", content: text });
const results = (calls) =>
  history.push({
    role: "tool",
    content: calls.map((call, i) => ({
      type: "tool-result",
      toolCallId: call.id,
      toolName: call.name,
      output: { type: "text", value: turns.results[i % turns.results.length] },
    })),
  });
const local = (options) => ({ providerOptions: { local: options } });

say("hello");
await ask("hello", { tools, stream: false });
say("weather in Oslo?");
results(await ask("call", { tools, toolChoice: { type: "tool", toolName: "weather" } }));
await ask("result", { tools });
say("and read the file");
results(await ask("calls", { tools, toolChoice: "required", ...local(turns.two_calls) }));
await ask("results", { tools });
say("sum up as JSON");
await ask("schema", { tools, output: Output.object({ schema: jsonSchema(turns.schema) }) });
say("spell the alphabet up to l");
await ask("stop", { tools, stopSequences: ["m"] });
const title = [{ role: "user", content: "A title for this chat" }];
await ask("title", { messages: title, maxOutputTokens: 8 });
say("think");
await ask("think", { tools, ...local({ reasoningEffort: "high" }) });
say("and now without");
await ask("after", { tools, ...local({ reasoningEffort: "none" }) });
try {
  await ask("error", { temperature: -1 });
} catch (error) {
  if (!APICallError.isInstance(error)) throw error;
  console.log(JSON.stringify({ turn: "error", status: error.statusCode, message: error.message }));
}
await ask("long", { messages: [{ role: "user", content: turns.long }] });
