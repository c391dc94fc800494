// LangChain.js.
import { OpenAIEmbeddings } from "@langchain/openai";
import { run } from "./cases.mjs";

const embeddings = new OpenAIEmbeddings();

await run(["@langchain/openai", "openai"], {
  default: async (given) =>
    typeof given === "string"
      ? [await embeddings.embedQuery(given)]
      : embeddings.embedDocuments(given),
});
