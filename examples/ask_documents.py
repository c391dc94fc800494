"""Answer a question from a few documents: embeddings find the right one, chat reads it.

An ordinary application on OpenAI's client; it knows nothing of the proxy. With OPENAI_BASE_URL at
the proxy it says the same: chat is passed on, and no document is embedded twice.

    python examples/ask_documents.py "Who may open the vault?"
"""

import sys

from openai import OpenAI

DOCUMENTS = [
    "The canteen opens at noon and closes at two.",
    "The vault is opened by two of the three keepers together.",
    "Bicycles are parked behind the north wing.",
]
EMBEDDING_MODEL = "text-embedding-3-small"
CHAT_MODEL = "gpt-4o-mini"


def main(question: str) -> None:
    """Print the document that is nearest to a question, and the answer as it is written."""
    client = OpenAI()

    reply = client.embeddings.create(model=EMBEDDING_MODEL, input=[question, *DOCUMENTS])
    asked, *vectors = (item.embedding for item in reply.data)
    nearness = [sum(a * b for a, b in zip(asked, one, strict=True)) for one in vectors]
    document = DOCUMENTS[nearness.index(max(nearness))]
    print(f"From: {document}")

    stream = client.chat.completions.create(
        model=CHAT_MODEL,
        messages=[
            {"role": "system", "content": f"Answer from this document alone: {document}"},
            {"role": "user", "content": question},
        ],
        stream=True,
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "Who may open the vault?")
