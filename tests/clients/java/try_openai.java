// The official client.

import com.fasterxml.jackson.databind.JsonNode;
import com.openai.client.OpenAIClient;
import com.openai.client.okhttp.OpenAIOkHttpClient;
import com.openai.models.embeddings.Embedding;
import com.openai.models.embeddings.EmbeddingCreateParams;
import com.openai.models.embeddings.EmbeddingCreateParams.EncodingFormat;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

class TryOpenAI {
    static final String MODEL = "text-embedding-3-small";

    static List<List<Float>> embed(OpenAIClient client, EmbeddingCreateParams.Builder request) {
        List<List<Float>> vectors = new ArrayList<>();
        for (Embedding item : client.embeddings().create(request.build()).data()) {
            vectors.add(item.embedding());
        }
        return vectors;
    }

    /** Returns a request for a case, in whichever of the four forms of an input it has. */
    static EmbeddingCreateParams.Builder request(JsonNode given) {
        EmbeddingCreateParams.Builder request = EmbeddingCreateParams.builder().model(MODEL);
        if (given.isTextual()) {
            return request.input(given.textValue());
        }
        if (given.get(0).isTextual()) {
            List<String> texts = new ArrayList<>();
            given.forEach(text -> texts.add(text.textValue()));
            return request.inputOfArrayOfStrings(texts);
        }
        if (given.get(0).isNumber()) {
            return request.inputOfArrayOfTokens(tokens(given));
        }
        List<List<Long>> arrays = new ArrayList<>();
        given.forEach(array -> arrays.add(tokens(array)));
        return request.inputOfArrayOfTokenArrays(arrays);
    }

    static List<Long> tokens(JsonNode array) {
        List<Long> tokens = new ArrayList<>();
        array.forEach(token -> tokens.add(token.longValue()));
        return tokens;
    }

    static Map<String, Cases.Way> ways(OpenAIClient client) {
        EncodingFormat decimal = EncodingFormat.FLOAT;
        Map<String, Cases.Way> ways = new LinkedHashMap<>();
        ways.put("default", given -> embed(client, request(given)));
        ways.put("decimal", given -> embed(client, request(given).encodingFormat(decimal)));
        return ways;
    }

    public static void main(String[] arguments) throws Exception {
        OpenAIClient client = OpenAIOkHttpClient.fromEnv();
        Cases.run(
                arguments,
                ways(client),
                url -> ways(OpenAIOkHttpClient.builder().fromEnv().baseUrl(url).build()));
        // The threads of the HTTP client would keep the program running.
        System.exit(0);
    }
}
