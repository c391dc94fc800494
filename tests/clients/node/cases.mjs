// What each script here is told, and what it says: texts on its input, vectors on its output; see
// ../python/cases.py.
import { readFileSync } from "node:fs";

function packed(vector) {
  return Buffer.from(Float32Array.from(vector).buffer).toString("base64");
}

function isSingle(vector) {
  return vector.every((number) => Math.fround(number) === number);
}

async function answer(embed, given) {
  try {
    const vectors = await embed(given);
    return { vectors: vectors.map(packed), exact: vectors.every(isSingle) };
  } catch (error) {
    return { refused: error.status ?? error.statusCode ?? error.name };
  }
}

// Make one request with the client's own retries, and return how it ended.
async function ending(embed, text) {
  // The client's jitter is the same at each run, so that two runs can be compared.
  Math.random = () => 0.5;
  const result = { outcome: "ok", error: null, status: null, code: null };
  const begun = performance.now();
  try {
    await embed(text);
  } catch (raised) {
    // The AI SDK puts the last failure into an error of its own.
    const error = raised.lastError ?? raised;
    result.outcome = "gave up";
    result.error = error.name === "Error" ? error.constructor.name : error.name;
    result.status = error.status ?? error.statusCode ?? null;
    result.code = error.code ?? error.data?.error?.code ?? null;
  }
  return { ...result, seconds: (performance.now() - begun) / 1000 };
}

// Answer every case in each of these ways; or with the argument give-up, make one request.
export async function run(packages, ways) {
  const cases = JSON.parse(readFileSync(0, "utf8"));
  const versions = {};
  for (const name of packages) {
    const file = new URL(`node_modules/${name}/package.json`, import.meta.url);
    versions[name] = JSON.parse(readFileSync(file, "utf8")).version;
  }
  if (process.argv[2] === "give-up") {
    const [embed] = Object.values(ways);
    const report = { versions, ending: await ending(embed, cases.text) };
    process.stdout.write(JSON.stringify(report));
    return;
  }
  const answers = {};
  for (const [way, embed] of Object.entries(ways)) {
    for (const [name, given] of Object.entries(cases)) {
      answers[`${way}: ${name}`] = await answer(embed, given);
    }
  }
  process.stdout.write(JSON.stringify({ versions, answers }));
}
