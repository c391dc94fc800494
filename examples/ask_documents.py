"""Answer a question from a few documents: embeddings find the document, chat reads it.

This application uses OpenAI's client and does not know the proxy. With OPENAI_BASE_URL set to the
proxy it prints the same. The proxy forwards the chat call, and buys each embedding once.

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
    """Print the document that is nearest to a question, and the answer as it arrives."""
    client = OpenAI()

    reply = client.embeddings.create(model=EMBEDDING_MODEL, input=[question, *DOCUMENTS])
    query, *vectors = (item.embedding for item in reply.data)
    products = [sum(a * b for a, b in zip(query, vector, strict=True)) for vector in vectors]
    document = DOCUMENTS[products.index(max(products))]
    print(f"From: {document}")

    stream = client.chat.completions.create(
        model=CHAT_MODEL,
        messages=[
            {"role": "system", "content": f"Answer only from this document: {document}"},
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
