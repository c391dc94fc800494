// The official client.
package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/openai/openai-go/v3"
)

const model = "text-embedding-3-small"

func main() {
	client := openai.NewClient()

	embed := func(input openai.EmbeddingNewParamsInputUnion, format openai.EmbeddingNewParamsEncodingFormat) ([][]float64, error) {
		reply, err := client.Embeddings.New(context.Background(), openai.EmbeddingNewParams{
			Model:          model,
			Input:          input,
			EncodingFormat: format,
		})
		if err != nil {
			return nil, err
		}
		vectors := make([][]float64, len(reply.Data))
		for i, item := range reply.Data {
			vectors[i] = item.Embedding
		}
		return vectors, nil
	}

	run("github.com/openai/openai-go/v3", []way{
		{"default", func(given json.RawMessage) ([][]float64, error) {
			input, err := inputOf(given)
			if err != nil {
				return nil, err
			}
			return embed(input, "")
		}},
		{"decimal", func(given json.RawMessage) ([][]float64, error) {
			input, err := inputOf(given)
			if err != nil {
				return nil, err
			}
			return embed(input, openai.EmbeddingNewParamsEncodingFormatFloat)
		}},
	})
}

// inputOf returns a case in whichever of the four forms of an input it has.
func inputOf(given json.RawMessage) (openai.EmbeddingNewParamsInputUnion, error) {
	var text string
	var texts []string
	var tokens []int64
	var arrays [][]int64
	switch {
	case json.Unmarshal(given, &text) == nil:
		return openai.EmbeddingNewParamsInputUnion{OfString: openai.String(text)}, nil
	case json.Unmarshal(given, &texts) == nil:
		return openai.EmbeddingNewParamsInputUnion{OfArrayOfStrings: texts}, nil
	case json.Unmarshal(given, &tokens) == nil:
		return openai.EmbeddingNewParamsInputUnion{OfArrayOfTokens: tokens}, nil
	case json.Unmarshal(given, &arrays) == nil:
		return openai.EmbeddingNewParamsInputUnion{OfArrayOfTokenArrays: arrays}, nil
	}
	return openai.EmbeddingNewParamsInputUnion{}, fmt.Errorf("not an input: %s", given)
}
