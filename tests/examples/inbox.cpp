// An inbox in the browser, for those who write programs that send mail: one loop, two servers, no thread. Mail comes in
// by SMTP and is looked at by HTTP. The page asks for the list; the answer waits in the loop until there is new mail.
//
//     c++ -std=c++17 -I. tests/examples/inbox.cpp smtpd.cpp asyncore.cpp -o inbox
//     ./inbox                             # mail goes to 127.0.0.1:1025; look at http://127.0.0.1:8025/
//
// Usage: inbox [SMTP_PORT [HTTP_PORT [KEEP]]]. The last KEEP messages are kept (100), and 256 MiB of them at most.
// For tests: GET /messages, a list in JSON; /messages?not=VERSION, the same once it has another version, or after 25
// seconds; /messages/ID/text, /html, /source, /parts/N; DELETE /messages, /messages/ID.
#include <cstdlib>
#include <iostream>
#include <sstream>

#include "mime.hpp"
#include "smtpd.hpp"

extern const char *const page, *const style, *const script;

std::string json(std::string_view text) {
    std::string to = "\"";
    for (const char c : mime::to_utf8(text)) {
        if (c == '"' || c == '\\') to += '\\';
        to += c < 0 || c >= ' ' ? std::string(1, c) : std::string("\\u00") + "01"[c >> 4] + "0123456789abcdef"[c & 15];
    }
    return to + '"';
}

struct Mail {
    const std::uint64_t id;
    const std::string data;
    const mime::part top{data};
    const std::vector<mime::part> parts = top.leaves();   // these two look into `data`
    std::string text, summary;                            // JSON

    Mail(std::uint64_t number, const std::string& from, const std::vector<std::string>& rcpttos, std::string&& message)
        : id(number), data(std::move(message)) {
        std::string to, files;
        for (const auto& it : rcpttos) to += (to.empty() ? "" : ",") + json(it);
        for (const auto& it : parts) {
            if (it.type == "text/plain" && !it.attachment) text += it.text();
            if (it.attachment)
                files += (files.empty() ? "" : ",") + ("{\"part\":" + std::to_string(&it - parts.data())) +
                         ",\"type\":" + json(it.type) + ",\"name\":" + json(it.filename) +
                         ",\"size\":" + std::to_string(it.content().size()) + "}";
        }
        const auto now = std::chrono::system_clock::now().time_since_epoch() / std::chrono::milliseconds(1);
        summary = "{\"id\":" + std::to_string(id) + ",\"time\":" + std::to_string(now) + ",\"mailfrom\":" + json(from);
        for (const std::string name : {"from", "to", "subject"})
            summary += ",\"" + name + "\":" + json(top.header(name));
        summary += ",\"rcpttos\":[" + to + "],\"size\":" + std::to_string(data.size()) +
                   ",\"html\":" + (html() ? "true" : "false") + ",\"text\":" + json(text.substr(0, 300)) +
                   ",\"parts\":[" + files + "]}";
    }
    Mail(const Mail&) = delete;
    const mime::part* html() const {
        for (const auto& it : parts)
            if (it.type == "text/html" && !it.attachment) return &it;
        return nullptr;
    }
};

class WebChannel;

// The mail, and the server that shows it.
struct Inbox : asyncore::dispatcher {
    std::size_t keep = 100, bytes = 0;
    std::list<Mail> mails;
    std::uint64_t last_id = 0, version;   // another start has other versions
    std::list<WebChannel*> waiting;       // for another version

    explicit Inbox(const asyncore::address& where) {
        version = static_cast<std::uint64_t>(std::chrono::system_clock::now().time_since_epoch() /
                                             std::chrono::milliseconds(1));
        create_socket();
        set_reuse_addr();
        bind(where);
        listen(SOMAXCONN);
    }
    ~Inbox() override { asyncore::close_all(_map, true); }   // before that goes which its channels look at
    void handle_accepted(std::unique_ptr<asyncore::socket_type> sock, const asyncore::address&) override;
    void add(const std::string& mailfrom, const std::vector<std::string>& rcpttos, std::string&& data) {
        bytes += mails.emplace_back(++last_id, mailfrom, rcpttos, std::move(data)).data.size();
        while (mails.size() > keep || (bytes > 256 << 20 && mails.size() > 1)) remove(mails.begin());
        changed();
    }
    void remove(std::list<Mail>::iterator it) { bytes -= it->data.size(), mails.erase(it); }
    void changed();
};

// One browser's connection. A request is what stands before its empty line: none has a body.
class WebChannel : public asynchat::async_chat {
  public:
    WebChannel(std::unique_ptr<asyncore::socket_type> sock, Inbox& of)
        : async_chat(std::move(sock), of._map), inbox(of) {
        set_terminator("\r\n\r\n");
        ac_out_queue_limit = 1;   // the next request is read when this one's answer is sent
    }
    void collect_incoming_data(std::string_view data) override {
        incoming += data;
        if (incoming.size() > 16384) fail("431 Request Header Fields Too Large");
    }
    void found_terminator() override {
        if (input_over()) return;
        std::istringstream lines(_get_data());
        std::string line, target, protocol;
        std::map<std::string, std::string> fields;
        std::getline(lines, line);
        std::istringstream(line) >> method >> target >> protocol;
        while (std::getline(lines, line)) {
            const auto colon = std::min(line.find(':'), line.size() - 1);
            auto& field = fields[mime::lower(line.substr(0, colon))];
            (field += field.empty() ? "" : ", ") += mime::strip(line.substr(colon + 1));
        }
        wait(30);
        last = protocol != "HTTP/1.1" || mime::lower(fields["connection"]) == "close";
        // Nobody's page but ours may drive this. A name that another's DNS leads here stands in Host; a page of another
        // site is told by Origin or Sec-Fetch-Site. That one may lead to "/", and no further.
        const auto host = fields["host"], name = host.substr(0, host.rfind(':')), site = fields["sec-fetch-site"];
        const auto port = ":" + std::to_string(inbox.socket->getsockname().port), origin = fields["origin"];
        if (name != "localhost" && name != "127.0.0.1" && name != "[::1]") return fail("421 Misdirected Request");
        if (host != name + port && host + ":80" != name + port) return fail("421 Misdirected Request");
        if (!origin.empty() && origin != "http://" + host) return fail("403 Forbidden");
        if (!site.empty() && site != "same-origin" && site != "none" && target != "/") return fail("403 Forbidden");
        if (fields.count("transfer-encoding") > 0 || fields["content-length"].find_first_not_of('0') != line.npos)
            return fail("413 Content Too Large");
        if (method != "GET" && method != "HEAD" && method != "DELETE")
            return fail("405 Method Not Allowed", "Allow: GET, HEAD, DELETE\r\n");
        method == "DELETE" ? remove(target) : get(target);
    }
    void answer_list() {
        std::string list;
        for (const auto& mail : inbox.mails) (list += list.empty() ? "" : ",") += mail.summary;
        answer("application/json", "{\"version\":" + std::to_string(inbox.version) + ",\"messages\":[" + list + "]}");
        resume();
    }
    void close() override { inbox.waiting.remove(this), async_chat::close(); }
    void handle_write() override { wait(30), async_chat::handle_write(); }
    asyncore::clock::time_point deadline() override { return std::min(async_chat::deadline(), due); }
    void handle_timeout() override {
        if (async_chat::deadline() <= asyncore::clock::now()) async_chat::handle_timeout();
        if (!connected || due > asyncore::clock::now()) return;
        if (!paused()) return close();
        inbox.waiting.remove(this);
        answer_list();
    }

  private:
    void wait(int seconds) { due = asyncore::clock::now() + std::chrono::seconds(seconds); }
    static std::vector<std::string> words(const std::string& target) {   // /messages/ID/parts/N
        std::vector<std::string> result;
        std::istringstream path(target.substr(0, target.find('?')));
        for (std::string word; std::getline(path, word, '/');) result.push_back(word);
        result.resize(5);
        return result;
    }
    std::list<Mail>::iterator find(const std::string& id) {
        return std::find_if(inbox.mails.begin(), inbox.mails.end(),
                            [&](auto& it) { return std::to_string(it.id) == id; });
    }
    void remove(const std::string& target) {
        const auto path = words(target);
        const auto mail = find(path[2]);
        if (path[1] != "messages" || !path[3].empty() || (mail == inbox.mails.end() && !path[2].empty()))
            return fail("404 Not Found");
        path[2].empty() ? inbox.mails.clear() : inbox.remove(mail);
        inbox.changed();
        answer_list();
    }
    void get(const std::string& target) {
        const auto path = words(target);
        const auto mail = find(path[2]);
        if (target == "/")
            return answer("text/html", page, "",
                          "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
                          "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                          "require-trusted-types-for 'script'");
        if (target == "/inbox.css") return answer("text/css", style);
        if (target == "/inbox.js") return answer("text/javascript", script);
        if (path[1] == "messages" && path[2].empty()) {
            if (target.find("?not=" + std::to_string(inbox.version)) == target.npos) return answer_list();
            inbox.waiting.push_back(this);
            wait(25);
            return pause();
        }
        if (path[1] != "messages" || mail == inbox.mails.end()) return fail("404 Not Found");
        if (path[3] == "source") return answer("text/plain", mail->data);
        if (path[3] == "text") return answer("text/plain", mail->text);
        if (path[3] == "html" &&
            mail->html())   // A stranger's page. It runs nothing and loads nothing; its links open elsewhere.
            return answer("text/html",
                          "<!doctype html><base target=_blank>" + with_pictures(*mail, mail->html()->text()), "",
                          "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action "
                          "'none'; frame-ancestors 'self'; sandbox allow-popups allow-popups-to-escape-sandbox");
        const auto n = static_cast<std::size_t>(std::atoi(path[4].c_str()));
        if (path[3] != "parts" || n >= mail->parts.size()) return fail("404 Not Found");
        std::string name;
        for (const char c : mail->parts[n].filename) {
            const bool safe = std::isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '-';
            name += safe ? std::string(1, c)
                         : std::string("%") + "0123456789ABCDEF"[c >> 4 & 15] + "0123456789ABCDEF"[c & 15];
        }
        answer("application/octet-stream", mail->parts[n].content(),
               "Content-Disposition: attachment; filename*=UTF-8''" + name + "\r\n");
    }
    // src="cid:NAME" is a picture that came with the message: it is put in as it came, in base64.
    static std::string with_pictures(const Mail& mail, const std::string& html) {
        std::string to;
        std::size_t at = 0;
        for (std::size_t cid; (cid = html.find("cid:", at)) != html.npos && to.size() < 32 << 20;) {
            to += html.substr(at, cid - at);
            at = std::min(html.find_first_of("\"')> \n", cid), html.size());
            const auto id = html.substr(cid + 4, at - cid - 4);
            for (const auto& it : mail.parts) {
                if (it.id != id || it.encoding != "base64" || it.type.substr(0, 6) != "image/") continue;
                to += "data:image/png;base64,";   // the browser looks for itself which kind it is
                std::copy_if(it.body.begin(), it.body.end(), std::back_inserter(to),
                             [](char c) { return c > ' ' && c != '"' && c != '\'' && c != '<' && c != '>'; });
                break;
            }
        }
        return to + html.substr(at);
    }
    void fail(const std::string& status, const std::string& more = "") {
        last = true;
        answer("text/plain", status + "\n", more, "default-src 'none'", status);
    }
    void answer(const std::string& type, const std::string& body, const std::string& more = "",
                const std::string& policy = "default-src 'none'; frame-ancestors 'self'; sandbox",
                const std::string& status = "200 OK") {
        wait(30);
        push("HTTP/1.1 " + status + "\r\nContent-Type: " + type +
             "; charset=utf-8\r\nContent-Length: " + std::to_string(body.size()) +
             "\r\nConnection: " + (last ? "close" : "keep-alive") + "\r\nContent-Security-Policy: " + policy +
             "\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
             "Cross-Origin-Resource-Policy: same-origin\r\nX-DNS-Prefetch-Control: off\r\n" +
             more + "\r\n" + (method == "HEAD" ? "" : body));
        if (last) end_input(), close_when_done();
    }

    Inbox& inbox;
    std::string method;
    bool last = false;   // no request will follow
    asyncore::clock::time_point due = asyncore::clock::now() + std::chrono::seconds(30);
};

void Inbox::handle_accepted(std::unique_ptr<asyncore::socket_type> sock, const asyncore::address&) {
    if (_map->size() < 200) _map->own(std::make_unique<WebChannel>(std::move(sock), *this));
}

void Inbox::changed() {
    ++version;
    while (!waiting.empty()) {
        WebChannel* channel = waiting.front();
        waiting.pop_front();
        channel->answer_list();
    }
}

struct MailServer : smtpd::SMTPServer {
    Inbox& inbox;
    MailServer(const asyncore::address& where, Inbox& to) : SMTPServer(where, {}), inbox(to) {}
    std::optional<std::string> process_message(const asyncore::address&, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options&) override {
        inbox.add(mailfrom, rcpttos, std::move(data));
        return std::nullopt;
    }
};

int main(int argc, char** argv) {
    Inbox inbox({"127.0.0.1", argc > 2 ? std::atoi(argv[2]) : 8025});
    inbox.keep = argc > 3 ? std::max<std::size_t>(1, std::strtoul(argv[3], nullptr, 10)) : 100;
    MailServer server({"127.0.0.1", argc > 1 ? std::atoi(argv[1]) : 1025}, inbox);
    std::cout << "mail to " << server.socket->getsockname().str() << ", look at http://"
              << inbox.socket->getsockname().str() << '/' << std::endl;
    asyncore::loop();
}

const char *const page = R"~(<!doctype html><html lang="en"><meta charset="utf-8"><title>Inbox</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:image/svg+xml,
<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><rect y='2' width='16' height='12' rx='2' fill='%23b3472b'/>
<path d='m2 5 6 4 6-4' fill='none' stroke='white'/></svg>">
<link rel="stylesheet" href="/inbox.css"><script src="/inbox.js" defer></script>
<aside><header><h1>Inbox</h1><span id="state" role="status"></span><button id="clear" hidden>Delete all</button></header>
<nav id="list"></nav>
<section id="empty" hidden><h2>No mail yet</h2><p>What is sent to this server shows here as soon as it comes.</p>
<pre>swaks --server 127.0.0.1:1025 \
      --to you@example.com</pre></section></aside>
<main id="pane"></main>)~",
                  *const style = R"~(
:root { color-scheme: light dark; --paper: #f7f5f1; --sheet: #fffefc; --ink: #24211d; --soft: #6f695f; --line: #e4dfd5;
  --accent: #b3472b; --pick: #f1e6dc; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181a; --sheet: #1e2023; --ink: #dedad2; --soft: #98938a;
  --line: #303337; --accent: #e88a6a; --pick: #33291f; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
body { margin: 0; height: 100vh; display: grid; grid-template-columns: minmax(290px, 370px) minmax(0, 1fr);
  background: var(--paper); color: var(--ink); }
aside, main { display: flex; flex-direction: column; min-height: 0; }
header, .row { display: flex; flex-wrap: wrap; gap: 8px; align-items: baseline; }
header { padding: 18px 20px 12px; }
h1 { margin: 0; font-size: 21px; }
h2 { margin: 0 0 10px; font-size: 23px; line-height: 1.25; overflow-wrap: anywhere; max-height: 5em; overflow: auto; }
button, .button { font: inherit; font-size: 13px; color: var(--ink); background: none; border: 1px solid var(--line);
  border-radius: 7px; padding: 4px 11px; cursor: pointer; text-decoration: none; }
button:hover, .button:hover { border-color: var(--soft); }
#state, #gap { flex: 1; color: var(--soft); font-size: 13px; }
nav { overflow: auto; }
nav a { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 10px; padding: 11px 20px 11px 17px; color: inherit;
  border-top: 1px solid var(--line); border-left: 3px solid transparent; text-decoration: none; animation: came 1.5s; }
@keyframes came { from { background: var(--pick); } }
nav a:hover { background: var(--sheet); }
nav a.open { background: var(--pick); border-left-color: var(--accent); }
nav a > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-weight: 400; font-style: normal; }
nav .new b, nav .new i { font-weight: 650; }
small, time, p, dt { color: var(--soft); font-size: 13px; }
#empty { padding: 4px 20px; }
main { background: var(--sheet); border-left: 1px solid var(--line); padding: 22px 32px 24px; }
main > p { margin: auto; font-size: 15px; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 1px 14px; margin: 0 0 14px; font-size: 14px; max-height: 9em;
  overflow: auto; }
dd { margin: 0; overflow-wrap: anywhere; }
.row { padding-bottom: 12px; flex-shrink: 0; max-height: 9em; overflow: auto; }
[aria-pressed=true] { background: var(--pick); border-color: var(--accent); }
#body { flex: 1; min-height: 0; overflow: auto; border-top: 1px solid var(--line); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, Menlo, "Liberation Mono", monospace; }
iframe { flex: 1; min-height: 0; border: 1px solid var(--line); border-radius: 8px; background: #fff; color-scheme: light; }
#back { display: none; }
@media (max-width: 760px) { body { display: block; } aside, main { height: 100vh; } main { padding: 16px; border: 0; }
  body:not(.reading) main, .reading aside { display: none; } #back { display: inline; } h2 { font-size: 19px; } }
@media (prefers-reduced-motion) { nav a { animation: none; } }
)~",
                  *const script = R"~(
const $ = id => document.getElementById(id), read = new Set(), rows = new Map();
const make = (tag, props, ...inside) => {
  const it = Object.assign(document.createElement(tag), props);
  it.append(...inside);
  return it;
};
const size = n => n < 1000 ? n + ' bytes' : n < 1e6 ? (n / 1e3).toFixed(1) + ' kB' : (n / 1e6).toFixed(1) + ' MB';
let version = 0, mails = [], open = 0;

function draw() {
  for (const id of rows.keys()) if (!mails.some(mail => mail.id === id)) rows.delete(id);
  for (const mail of mails) {
    const time = new Date(mail.time), today = time.toDateString() === new Date().toDateString();
    if (!rows.has(mail.id)) rows.set(mail.id, make('a', { href: '#' + mail.id },
      make('b', {}, mail.from.replace(/\s*<[^<>]*>$/, '').replace(/^"(.*)"$/, '$1') || mail.mailfrom),
      make('time', {}, today ? time.toTimeString().slice(0, 5) : time.toLocaleDateString()),
      make('i', {}, mail.subject || '(no subject)'), make('small', {}, mail.parts.length ? '+ ' + mail.parts.length : ''),
      make('small', {}, mail.text || '\u00a0')));
rows.get(mail.id).className = (mail.id == = open ? 'open ' : '') + (read.has(mail.id) ? '' : 'new');
}
$('list').replaceChildren(... mails.map(mail = > rows.get(mail.id)));
const unread = mails.filter(mail = > !read.has(mail.id)).length;
document.title = (unread ? '(' + unread + ') ' : '') + 'Inbox';
$('state').textContent = mails.length ? mails.length + (mails.length > 1 ? ' messages' : ' message') : '';
$('clear').hidden = !mails.length;
$('empty').hidden = mails.length > 0;
}

function show() {
    open = Number(location.hash.slice(1));
    const mail = mails.find(it = > it.id == = open), url = '/messages/' + open + '/';
    if (mail) read.add(open);
    document.body.className = mail ? 'reading' : '';
    draw();
    if (!mail)
        return $('pane').replaceChildren(make('p', {},
                                              !mails.length ? ''
                                              : open        ? 'This message is gone.'
                                                            : 'Choose a message.'));
  const tabs = ['HTML', 'Text', 'Source'].filter(name => ({ HTML: mail.html, Text: mail.text || !mail.html })[name] ?? true)
    .map(name => make('button', { onclick: () => view(name) }, name));
  async function view(name) {
      tabs.forEach(tab = > tab.setAttribute('aria-pressed', tab.textContent == = name));
      const frame = {
          id : 'body',
          title : 'The message',
          sandbox : 'allow-popups allow-popups-to-escape-sandbox',
          src : url + 'html'
      };
      const text = name == = 'HTML' ? '' : await(await fetch(url + name.toLowerCase())).text();
      $('body').replaceWith(name == = 'HTML' ? make('iframe', frame)
                                             : make('pre', {id : 'body', tabIndex : 0}, text.slice(0, 1e6)));
  }
  const rows =
      [
          [ 'From', mail.from ], [ 'To', mail.to ],
          [ 'Envelope', mail.mailfrom + ' \u2192 ' + mail.rcpttos.join(', ') ],
          [ 'Received', new Date(mail.time).toLocaleString() + ', ' + size(mail.size) ]
      ]
          .filter(row = > row[1]);
  const files =
      mail.parts.map(part = > make('a', {className : 'button', href : url + 'parts/' + part.part, download : '' },
                                   part.name || part.type, ' ', make('small', {}, size(part.size))));
  $('pane').replaceChildren(
      make('h2', {}, mail.subject || '(no subject)'),
      make('dl', {}, ... rows.flatMap(([ name, value ]) = > [ make('dt', {}, name), make('dd', {}, value) ])),
      make('div', {className : 'row'}, make('a', {id : 'back', className : 'button', href : '#'}, '\u2190'), ... tabs,
           make('span', {id : 'gap'}), make('button', {id : 'delete', onclick : () = > remove(mail)}, 'Delete')),
      ... files.length ? [make('div', {className : 'row'}, ... files)] : [], make('pre', {id : 'body'}));
  view(tabs[0].textContent);
}

async function remove(mail) {
    const at = mails.findIndex(it = > it.id == = mail.id), next = mails[at + 1] || mails[at - 1];
    await fetch('/messages/' + mail.id, {method : 'DELETE'});
    location.hash = next && innerWidth > 760 ? next.id : '';
}

async function watch() {
    for (;;) try {
            const answer = await(await fetch('/messages?not=' + version)).json(), first = !version;
            mails = answer.messages.reverse();
            if (answer.version != = version) draw();
            if (answer.version != = version && (first || !rows.has(open))) show();
            version = answer.version;
            // A browser has six connections for all its pages: those that are out of sight need none.
            if (document.hidden)
                await new Promise(then = > document.addEventListener('visibilitychange', then, {once : true}));
        } catch (error) {
            $('state').textContent = 'The server is gone.';
            version = 0;
            await new Promise(then = > setTimeout(then, 1000));
        }
}
onhashchange = show;
$('clear').onclick = () = > confirm('Delete all messages?') && fetch('/messages', {method : 'DELETE'});
onkeydown = event = > {
    const at = mails.findIndex(mail = > mail.id == = open), next = mails[at + ({j : 1, k : -1}[event.key] || NaN)];
    if (next) location.hash = next.id;
};
watch();
)~";
