// The Vercel AI SDK with its provider for what is like OpenAI.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, embedMany } from "ai";
import { run } from "./cases.mjs";

const provider = createOpenAICompatible({
  name: "embedding-proxy",
  baseURL: process.env.OPENAI_BASE_URL,
  apiKey: process.env.OPENAI_API_KEY,
});
const model = provider.embeddingModel("text-embedding-3-small");

await run(["@ai-sdk/openai-compatible", "ai"], {
  default: async (given) =>
    typeof given === "string"
      ? [(await embed({ model, value: given })).embedding]
      : (await embedMany({ model, values: given })).embeddings,
});
