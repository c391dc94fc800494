// The Vercel AI SDK with its provider for OpenAI.
import { openai } from "@ai-sdk/openai";
import { embed, embedMany } from "ai";
import { run } from "./cases.mjs";

const model = openai.embedding("text-embedding-3-small");

await run(["@ai-sdk/openai", "ai"], {
  default: async (given) =>
    typeof given === "string"
      ? [(await embed({ model, value: given })).embedding]
      : (await embedMany({ model, values: given })).embeddings,
});
