// The official client.
import OpenAI from "openai";
import { run } from "./cases.mjs";

const client = new OpenAI();
const model = "text-embedding-3-small";

async function embed(input, options = {}) {
  const reply = await client.embeddings.create({ model, input, ...options });
  return reply.data.map((item) => item.embedding);
}

await run(["openai"], {
  default: embed,
  decimal: (input) => embed(input, { encoding_format: "float" }),
});
