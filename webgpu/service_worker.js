// A service worker: the page opens again when its server has ended. Each file is first asked of the server, so that a file that
// was changed, such as a kernel, is seen at once. Only where no answer comes, the copy of the last time is taken. page.js puts
// the page's files into the cache; no other files, such as checkpoints or those of other projects at this address, enter it.

addEventListener("install", () => skipWaiting());
addEventListener("activate", (event) => event.waitUntil(clients.claim()));
addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).origin === location.origin) event.respondWith(answer(event));
});

async function answer(event) {
  const cache = await caches.open("tinygpt"), { request } = event;
  const copy = await cache.match(request, { ignoreSearch: true });
  try {
    const found = await fetch(request);
    if (found.ok && copy) event.waitUntil(cache.put(request.url.split("?")[0], found.clone()));
    return found;
  } catch {
    return copy ?? Response.error();
  }
}
