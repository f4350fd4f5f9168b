// Server-sent events over fetch, which unlike EventSource can send a key and a body.

/** The key that the user gave, as a header. */
export function headers() {
  const key = localStorage.getItem("airjax.key");
  return key ? { authorization: "Bearer " + key } : {};
}

/** The error that an answer carries, as a sentence. */
export async function failure(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return "the server answered " + answer.status;
  }
}

/** Yields the value of each event until the stream ends. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
}
