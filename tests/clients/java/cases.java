import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ArrayNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import com.openai.core.Properties;
import com.openai.errors.OpenAIServiceException;
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.util.Base64;
import java.util.List;
import java.util.Map;
import java.util.function.Function;

/** What the script is told, and what it says: see ../python/cases.py. */
class Cases {
    interface Way {
        List<List<Float>> embed(JsonNode given);
    }

    static final ObjectMapper json = new ObjectMapper();

    /** Answers every case in each of these ways, or with the argument give-up makes one request. */
    static void run(
            String[] arguments, Map<String, Way> ways, Function<String, Map<String, Way>> waysAt)
            throws Exception {
        JsonNode cases = json.readTree(System.in);
        ObjectNode report = json.createObjectNode();
        report.putObject("versions").put("openai-java", Properties.getPackageVersion());
        if (arguments.length > 0 && arguments[0].equals("give-up")) {
            warmUp(waysAt);
            report.set("ending", request(ways.values().iterator().next(), cases.get("text")));
        } else {
            ObjectNode answers = report.putObject("answers");
            for (Map.Entry<String, Way> way : ways.entrySet()) {
                for (Map.Entry<String, JsonNode> one : cases.properties()) {
                    String name = way.getKey() + ": " + one.getKey();
                    answers.set(name, answer(way.getValue(), one.getValue()));
                }
            }
        }
        System.out.println(json.writeValueAsString(report));
    }

    /** Makes requests of its own, since to load the classes of a first one takes seconds. */
    static void warmUp(Function<String, Map<String, Way>> waysAt) throws Exception {
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", 0), 0);
        byte[] refusal = "{\"error\": {\"code\": \"warm_up\"}}".getBytes(StandardCharsets.UTF_8);
        server.createContext(
                "/",
                exchange -> {
                    exchange.getRequestBody().readAllBytes();
                    exchange.getResponseHeaders().set("content-type", "application/json");
                    exchange.getResponseHeaders().set("retry-after-ms", "1");
                    exchange.sendResponseHeaders(429, refusal.length);
                    exchange.getResponseBody().write(refusal);
                    exchange.close();
                });
        server.start();
        String url = "http://127.0.0.1:" + server.getAddress().getPort() + "/v1";
        request(waysAt.apply(url).values().iterator().next(), json.valueToTree("warm-up"));
        server.stop(0);
    }

    static ObjectNode answer(Way way, JsonNode given) {
        ObjectNode answer = json.createObjectNode();
        try {
            ArrayNode vectors = json.createArrayNode();
            for (List<Float> vector : way.embed(given)) {
                ByteBuffer raw =
                        ByteBuffer.allocate(4 * vector.size()).order(ByteOrder.LITTLE_ENDIAN);
                vector.forEach(raw::putFloat);
                vectors.add(Base64.getEncoder().encodeToString(raw.array()));
            }
            answer.set("vectors", vectors);
            // Its numbers are float32.
            return answer.put("exact", true);
        } catch (OpenAIServiceException error) {
            return answer.put("refused", error.statusCode());
        } catch (RuntimeException error) {
            return answer.put("refused", error.getClass().getSimpleName());
        }
    }

    /** Makes one request with the client's own retries, and tells how it ended. */
    static ObjectNode request(Way way, JsonNode text) {
        ObjectNode ending = json.createObjectNode().putNull("error").putNull("status");
        ending.putNull("code");
        long begun = System.nanoTime();
        try {
            way.embed(text);
            ending.put("outcome", "ok");
        } catch (RuntimeException error) {
            ending.put("outcome", "gave up").put("error", error.getClass().getSimpleName());
            if (error instanceof OpenAIServiceException) {
                OpenAIServiceException refusal = (OpenAIServiceException) error;
                ending.put("status", refusal.statusCode());
                refusal.code().ifPresent(code -> ending.put("code", code));
            }
        }
        return ending.put("seconds", (System.nanoTime() - begun) / 1e9);
    }
}
