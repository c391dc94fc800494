package main

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"github.com/openai/openai-go/v3"
)

// way is one way to embed a case. What the script is told and what it says: see ../python/cases.py.
type way struct {
	name  string
	embed func(given json.RawMessage) ([][]float64, error)
}

type answer struct {
	Vectors []string `json:"vectors,omitempty"`
	Exact   bool     `json:"exact"`
	Refused any      `json:"refused,omitempty"`
}

type ending struct {
	Outcome string  `json:"outcome"`
	Error   *string `json:"error"`
	Status  *int    `json:"status"`
	Code    *string `json:"code"`
	Seconds float64 `json:"seconds"`
}

// run answers every case in each of these ways, or with the argument give-up makes one request.
func run(module string, ways []way) {
	var cases map[string]json.RawMessage
	check(json.NewDecoder(os.Stdin).Decode(&cases))
	report := map[string]any{"versions": map[string]string{"openai-go": version(module)}}
	if len(os.Args) > 1 && os.Args[1] == "give-up" {
		report["ending"] = request(ways[0], cases["text"])
	} else {
		answers := map[string]answer{}
		for _, way := range ways {
			for _, name := range slices.Sorted(maps.Keys(cases)) {
				answers[way.name+": "+name] = answerTo(way, cases[name])
			}
		}
		report["answers"] = answers
	}
	check(json.NewEncoder(os.Stdout).Encode(report))
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func version(module string) string {
	build, _ := debug.ReadBuildInfo()
	for _, dependency := range build.Deps {
		if dependency.Path == module {
			return dependency.Version[1:]
		}
	}
	return "unknown"
}

func answerTo(way way, given json.RawMessage) answer {
	vectors, err := way.embed(given)
	if err != nil {
		var refusal *openai.Error
		if errors.As(err, &refusal) {
			return answer{Refused: refusal.StatusCode}
		}
		return answer{Refused: fmt.Sprintf("%T", err)}
	}
	result := answer{Exact: true}
	for _, vector := range vectors {
		raw := make([]byte, 0, 4*len(vector))
		for _, number := range vector {
			single := float32(number)
			raw = binary.LittleEndian.AppendUint32(raw, math.Float32bits(single))
			result.Exact = result.Exact && float64(single) == number
		}
		result.Vectors = append(result.Vectors, base64.StdEncoding.EncodeToString(raw))
	}
	return result
}

// request makes one request with the client's own retries, and tells how it ended.
func request(way way, text json.RawMessage) ending {
	begun := time.Now()
	_, err := way.embed(text)
	result := ending{Outcome: "ok", Seconds: time.Since(begun).Seconds()}
	if err == nil {
		return result
	}
	result.Outcome = "gave up"
	kind := fmt.Sprintf("%T", err)
	result.Error = &kind
	var refusal *openai.Error
	if errors.As(err, &refusal) {
		result.Status = &refusal.StatusCode
		if refusal.Code != "" {
			result.Code = &refusal.Code
		}
	}
	return result
}
