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

// Answer every case in each of these ways, one after another.
export async function run(packages, ways) {
  const cases = JSON.parse(readFileSync(0, "utf8"));
  const answers = {};
  for (const [way, embed] of Object.entries(ways)) {
    for (const [name, given] of Object.entries(cases)) {
      answers[`${way}: ${name}`] = await answer(embed, given);
    }
  }
  const versions = {};
  for (const name of packages) {
    const file = new URL(`node_modules/${name}/package.json`, import.meta.url);
    versions[name] = JSON.parse(readFileSync(file, "utf8")).version;
  }
  process.stdout.write(JSON.stringify({ versions, answers }));
}
