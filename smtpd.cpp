#include "smtpd.hpp"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <iostream>
#include <ostream>

namespace smtpd {
inline namespace v1 {

using asyncore::address;

// Without a buffer a stream discards what it is given. As with default_socket_map(), a static server finds it made.
std::ostream& default_debugstream() {
    static std::ostream stream(nullptr);
    return stream;
}

namespace {

constexpr std::chrono::hours for_ever{24 * 365 * 100};
constexpr char not_processed[] = "451 Error: message not processed";
constexpr std::size_t kept_size = 65536;   // bytes of the last message that an idle client may hold
constexpr std::size_t slow_size = 65536;   // bytes that data_timeout is for

// Whether that is a limit at all. The clock plus a time of centuries would overflow, and be in the past.
bool ends(std::chrono::milliseconds time) { return time.count() > 0 && time < for_ever; }

// Asked before each line of the log, since a repr() that is discarded costs as much as one that is printed.
bool debugging() { return default_debugstream().rdbuf() != nullptr; }

const reply no_SMTPUTF8{550, "Error: SMTPUTF8 is not supported by the next server"};

// The handler that a method is given. A null one throws here, before anything is sent.
template <typename Handler>
Handler checked(Handler then) {
    if (!then) throw std::invalid_argument("there is no handler for the answer");
    return then;
}

// Does what may fail without harm, such as a farewell, and tells whether it worked.
template <typename Act>
bool succeeds(Act act) noexcept {
    try {
        act();
        return true;
    } catch (...) {
        return false;
    }
}

bool is_crlf(std::string_view text) { return text.size() > 1 && text[0] == '\r' && text[1] == '\n'; }   // its front

// Below, after Python's part.
bool is_ascii(std::string_view text);
bool is_control(char c);
std::string upper(std::string_view text);
std::size_t utf8_length(std::string_view text);
std::size_t utf8_prefix(std::string_view text);
bool is_utf8(std::string_view text);
std::string_view strip(std::string_view text);
std::vector<std::string> split(std::string_view text);
std::string list_repr(const std::vector<std::string>& list);
void append_unstuffed(std::string& out, std::string_view in);
bool parse_address(std::string_view arg, std::string& address, std::string_view& rest);
bool is_reply(std::string_view text);
std::size_t line_length(std::string_view text);
void no_delay(asyncore::socket_type& socket);
bool pick_options(const SMTP& session, const std::vector<std::string>& mail_options, bool size, bool utf8,
                  std::vector<std::string>& with);

}   // namespace

// A reply that is owed: see "Replies that come later".
struct deferred_reply::owed {
    SMTPChannel* channel;   // null: the client has its reply, or has gone
    bool deferred = false;
    bool in_hook = true;                 // the hook or the command is still running
    std::optional<std::string> status;   // given while it was

    explicit owed(SMTPChannel* who);
    owed(const owed&) = delete;
    owed& operator=(const owed&) = delete;
    ~owed() { settle(std::nullopt); }   // no token is left that could answer
    void settle(std::optional<std::string_view> reply);
    // Closes the channel when `answer` throws: a client that can't be answered is not left waiting.
    static void guarded(SMTPChannel& waiting, const std::function<void()>& answer) noexcept;
};

// ---------------------------------------------------------------------------------------------------------
// SMTPChannel
// ---------------------------------------------------------------------------------------------------------

// The states of a channel.
//
//   smtp_state        COMMAND: a line ends at CR LF. DATA: a message ends at CR LF . CR LF. Others: a subclass's own.
//   paused()          a reply is owed. Nothing is read and nothing is executed; what has been received waits in order.
//   input_over()      the last reply has been pushed. The channel closes when that has been sent.
//   smtp_server null  the server has gone, and the channel is closed.
//
// A command: collect_incoming_data() gathers the line, found_terminator() finds its verb's method, and that pushes one
// reply. A message: DATA changes state and terminator, the bytes are unstuffed as they come, and at the end the
// server's process_message() returns the reply. Bytes past a limit are dropped: the reply says so when the line or the
// message has ended, and the client stays in step.

std::size_t SMTPChannel::max_command_size_limit() const {
    // Python leaves command_size_limit out, and the limit of one verb becomes every command's.
    std::size_t largest = command_size_limit;
    for (const auto& [verb, limit] : command_size_limits) largest = std::max(largest, limit);
    return largest;
}

SMTPChannel::SMTPChannel(SMTPServer& server, std::unique_ptr<asyncore::socket_type> sock, const address& from)
    : SMTPChannel(server, std::move(sock), from, server.settings) {}

// The channel takes its settings from the server once, so each may be changed for one client. Python greets here. In
// C++ a constructor can't call an override of push(), so SMTPServer calls start() when the channel is complete.
SMTPChannel::SMTPChannel(SMTPServer& server, std::unique_ptr<asyncore::socket_type> sock, const address& from,
                         const options& with)
    : async_chat(std::move(sock), with.map),
      smtp_server(&server),
      conn(socket.get()),
      data_size_limit(with.data_size_limit),
      enable_SMTPUTF8(with.enable_SMTPUTF8),
      _decode_data(with.decode_data),
      fqdn(with.fqdn),
      peer(addr),   // what the socket says; addr is what accept() has said, as in Python
      idle_timeout(with.idle_timeout),
      data_timeout(with.data_timeout),
      rcpt_limit(with.rcpt_limit) {
    if (enable_SMTPUTF8 && _decode_data)
        throw std::invalid_argument("decode_data and enable_SMTPUTF8 cannot be set to True at the same time");
    addr = from;
    ac_out_queue_limit = with.reply_queue_limit;   // Python goes on
    _set_rset_state();
    if (!connected) close();   // the client has gone before we could look
    server.channels_.insert(this);
}

// A token may outlive the channel: it then answers no client.
SMTPChannel::~SMTPChannel() {
    if (owed_) owed_->channel = nullptr;
    if (smtp_server) smtp_server->channels_.erase(this);
}

void SMTPChannel::start() {
    if (!connected) return;
    if (debugging()) DEBUGSTREAM << "Peer: " << peer.repr() << std::endl;
    push("220 " + fqdn + " " + std::string(version));
}

// After a message, a refused one too: ready for the next MAIL. received_data stays, as in Python.
void SMTPChannel::_set_post_data_state() {
    smtp_state = COMMAND;
    mailfrom.clear();
    rcpttos.clear();
    require_SMTPUTF8 = false;
    num_bytes = 0;
    declared_size_ = data_left_ = utf8_size_ = 0;
    data_starts_ = false;
    set_terminator("\r\n");
}

void SMTPChannel::_set_rset_state() {
    _set_post_data_state();
    received_data.clear();
    received_lines.clear();
}

// In an event of the loop the line only joins the queue, and gather() sends all of it at the end.
void SMTPChannel::push(std::string_view msg) {
    replied_ = true;
    std::string line;
    line.reserve(msg.size() + 2);
    line.append(msg).append("\r\n");
    queue(line);
    if (!gathering_) initiate_send();
}

// Python sends each reply by itself; here those of one event go together, also when an exception ends it. That goes on
// its way when they have been sent. An event may come inside another one, when a hook runs the loop: the outer one
// sends.
template <typename Event>
void SMTPChannel::gather(Event event) {
    const bool outermost = !std::exchange(gathering_, true);
    std::exception_ptr thrown;
    try {
        event();
    } catch (...) {
        thrown = std::current_exception();
    }
    if (outermost) {
        gathering_ = false;
        try {
            initiate_send();
        } catch (...) {
            if (!thrown) thrown = std::current_exception();
        }
    }
    if (thrown) std::rethrow_exception(thrown);
}

void SMTPChannel::handle_read() {
    gather([this] { async_chat::handle_read(); });
}

// conn is Python's second name for the socket, and changes with it.
void SMTPChannel::set_socket(std::unique_ptr<asyncore::socket_type> sock, asyncore::map_type* map) {
    async_chat::set_socket(std::move(sock), map);
    conn = socket.get();
}

// A piece of a line, or of a message. Every byte comes by here, so here are the idle clock, data_timeout's, and
// num_bytes. A message is unstuffed as it comes, so that its end costs nothing. data_timeout's clock is set anew
// whenever another 64 KiB have come (data_left_); a new message starts with none left.
void SMTPChannel::collect_incoming_data(std::string_view data) {
    if (smtp_state != COMMAND && smtp_state != DATA) {   // a state of a subclass: the line is its own affair
        if (received_lines.empty()) active_ = asyncore::clock::now();
        received_lines.append(data);
        return;
    }
    // A command is as old as its first byte, a message as its last; see also data_timeout.
    if (smtp_state == DATA || num_bytes == 0) active_ = asyncore::clock::now();
    if (smtp_state == DATA && data.size() >= data_left_) {
        data_left_ = slow_size + data.size();
        data_since_ = active_;
    }
    if (smtp_state == DATA) data_left_ -= data.size();
    // What smtp_DATA has put back, unless it became part of the terminator.
    if (std::exchange(data_starts_, false) && data.substr(0, 2) == "\r\n") data.remove_prefix(2);
    if (data.empty() || !smtp_server) return;
    const std::size_t limit = smtp_state == DATA ? data_size_limit : max_command_size_limit();
    if (limit && num_bytes > limit) return;
    num_bytes += data.size();
    if (limit && num_bytes > limit) {
        // Python keeps the chunk that went over the limit.
        std::string().swap(received_lines);
        return;
    }
    if (smtp_state != DATA) {
        received_lines.append(data);
        return;
    }
    if (num_bytes == data.size() && data[0] == '.') data.remove_prefix(1);   // the first line's dot
    if (num_bytes >= 65536) make_room(data.size());
    append_unstuffed(received_lines, data);
    if (_decode_data) utf8_size_ += utf8_prefix(std::string_view(received_lines).substr(utf8_size_));
}

// Appending alone would copy a large message again and again. So this reserves the declared size or that of the last
// message, the larger one, and past 4 MiB the usual limit. Unused pages are never touched, so they cost no memory. When
// the system refuses that much, less is asked for: the message may fit all the same.
void SMTPChannel::make_room(std::size_t more) {
    constexpr std::size_t large = 1 << 22;
    const std::size_t needed = received_lines.size() + more, before = received_lines.capacity();
    if (needed <= before) return;
    const std::size_t usual = std::min(data_size_limit, DATA_SIZE_DEFAULT);
    const std::size_t wish = std::max(declared_size_, std::min(smtp_server->message_size_, large));
    for (const std::size_t room :
         {std::max({needed, before * 2, wish, needed > large ? usual : 0}), needed + needed / 4})
        try {
            return received_lines.reserve(room);
        } catch (const std::exception&) {
            // it may be had for less
        }
    received_lines.reserve(needed);
}

// A line or a message is complete. It leaves received_lines first: whatever happens from here on, the next one starts
// with nothing.
void SMTPChannel::found_terminator() {
    if (!smtp_server) return;   // a subclass's collect_incoming_data() may have destroyed it
    std::string line;
    line.swap(received_lines);
    const std::size_t size = std::exchange(num_bytes, 0);
    if (debugging()) DEBUGSTREAM << "Data: " << asyncore::repr(line, _decode_data ? "" : "b") << std::endl;
    active_ = asyncore::clock::now();
    if (smtp_state == COMMAND) {
        execute(line, size);
        // The next line finds the room that this one had.
        if (received_lines.empty() && line.capacity() <= 1024) {
            line.clear();
            received_lines.swap(line);
        }
    } else if (smtp_state == DATA) {
        handle_message(std::move(line), size);
    } else {
        push("451 Internal confusion");
    }
    stop_when_idle();
}

// A command that throws has changed nothing: what it noted is taken back, the client gets 451, and the session goes on.
// If it has pushed a reply before, that can't be taken back, and what it threw ends the session. Python closes the
// connection in each case, without a reply.
void SMTPChannel::execute(std::string_view line, std::size_t size) {
    const std::size_t recipients = rcpttos.size();
    const bool open = !mailfrom.empty();
    replied_ = false;
    executing_ = true;
    std::exception_ptr leaving;
    try {
        handle_command(line, size);
        executing_ = false;
        if (const auto reply = std::exchange(asked_, nullptr)) finish(reply, std::nullopt);
        return;
    } catch (...) {
        executing_ = false;
        if (replied_ && asked_) finish(std::exchange(asked_, nullptr), std::nullopt);
        if (replied_) throw;
        leaving = log_unless_ExitNow("uncaptured C++ exception in a command of");
    }
    deferred_ = nothing;
    if (rcpttos.size() > recipients) rcpttos.resize(recipients);
    if (!open) mailfrom.clear();
    auto reply = std::exchange(asked_, nullptr);
    if (!reply) reply = std::make_shared<deferred_reply::owed>(this);
    reply->deferred = false;   // its tokens come too late
    finish(reply, "451 Error: command not processed", leaving);
}

// A hook has ended. The reply is what it has returned, unless it has deferred that. An ExitNow leaves the loop now,
// with the reply still owed: left_behind_ keeps it, and handle_timeout() gives 451 should the loop be entered again.
void SMTPChannel::finish(const std::shared_ptr<deferred_reply::owed>& reply, std::optional<std::string> status,
                         const std::exception_ptr& thrown) {
    reply->in_hook = false;
    if (thrown) {
        pause();
        left_behind_ = reply;
        std::rethrow_exception(thrown);
    }
    if (reply->deferred) status = reply->status;
    if (status || !reply->deferred) reply->settle(status.value_or(std::string()));
}

// Inside a catch block: logs the exception; ExitNow is returned instead, to be thrown again when all is in order.
std::exception_ptr SMTPChannel::log_unless_ExitNow(std::string_view what) {
    try {
        throw;
    } catch (const asyncore::ExitNow&) {
        return std::current_exception();
    } catch (...) {
        log_exception(what);
        return nullptr;
    }
}

// Refuses an address when a hook has said so. True: the command is over. A deferred one is judged when the token
// answers.
bool SMTPChannel::refused(const std::string& reply) {
    if (!connected) return true;   // the hook has closed it, or destroyed the server
    if (reply.empty() || asked_) return false;
    const bool proper = is_reply(reply) && reply[0] >= '4';
    if (!proper) log_info("not a refusal: " + asyncore::repr(reply), "error");
    push(proper ? std::string_view(reply) : "451 Error: command not processed");
    return true;
}

// A line is checked before it is looked at: its length, then UTF-8. A verb matches in ASCII only; a limit of its own
// counts after EHLO, since only an extension makes a line longer.
void SMTPChannel::handle_command(std::string_view line, std::size_t size) {
    if (size == 0) return push("500 Error: bad syntax");
    if (size > max_command_size_limit()) return push("500 Error: line too long");
    if (!is_utf8(line)) return push("500 Error: bad syntax");   // Python: the connection is closed
    const std::size_t space = line.find(' ');
    const std::string verb = upper(line.substr(0, space));
    argument arg;
    if (space != line.npos) arg = strip(line.substr(space + 1));
    std::size_t max_size = command_size_limit;
    if (extended_smtp)
        if (const auto limit = command_size_limits.find(verb); limit != command_size_limits.end())
            max_size = limit->second;
    if (size > max_size) return push("500 Error: line too long");
    if (!is_ascii(verb)) return push("500 Error: bad syntax");
    const command method = find_command(verb);
    if (!method) return push("500 Error: command \"" + verb + "\" not recognized");
    (this->*method)(arg);
}

// Gives the message to the server's process_message(), and the client the reply. The hook may return it, throw, defer
// it, or run the loop itself: the channel is paused meanwhile, so nothing of this client is read or executed.
void SMTPChannel::handle_message(std::string&& message, std::size_t size) {
    if (data_size_limit && size > data_size_limit) {
        // Python stays in DATA, and takes what follows for another message to the same recipients.
        _set_post_data_state();
        return push("552 Error: Too much mail data");
    }
    smtp_server->message_size_ = size;
    if (_decode_data && std::exchange(utf8_size_, 0) != message.size()) {
        _set_post_data_state();
        return push("554 Error: message is not valid UTF-8");
    }
    if (message.capacity() / 4 > message.size()) message.shrink_to_fit();   // the message may be kept for long
    received_data = std::move(message);
    auto reply = std::make_shared<deferred_reply::owed>(this);
    message_options kwargs;
    if (!_decode_data) {
        kwargs.mail_options = mail_options;
        kwargs.rcpt_options = rcpt_options;
    }
    kwargs.owed_ = asked_ = reply;   // weakly: a copy of kwargs keeps no client waiting
    std::optional<std::string> status;
    std::exception_ptr leaving;
    pause();   // a pass inside process_message() shall not read on
    try {
        status = smtp_server->process_message(peer, mailfrom, rcpttos, std::move(received_data), kwargs);
    } catch (...) {
        // Python: the connection is closed, without a reply.
        status = not_processed;
        reply->deferred = false;
        leaving = log_unless_ExitNow("uncaptured C++ exception in process_message of");
    }
    asked_ = nullptr;
    _set_post_data_state();
    active_ = asyncore::clock::now();
    finish(reply, std::move(status), leaving);
}

// Inside a command or a message there is one token, and what the hook returns is ignored. Outside, for a subclass in a
// state of its own, a token is new, and its answer is sent at once.
deferred_reply SMTPChannel::defer() {
    const auto reply = asked_ ? asked_ : std::make_shared<deferred_reply::owed>(this);
    reply->deferred = true;
    reply->in_hook = asked_ || executing_;
    if (executing_) asked_ = reply;
    pause();
    return deferred_reply(reply);
}

// Of a command too, in the words of a message: what the client has asked for was not done.
void SMTPChannel::answer_lost() { answer(not_processed); }

void SMTPChannel::resume() {
    async_chat::resume();
    active_ = asyncore::clock::now();
}

// The reply that was owed has come. Every reply of a hook comes by here, at once or later, so this is the place that
// checks that it is one. A refusal of MAIL or RCPT that was put off takes back what had been noted.
void SMTPChannel::answer(std::string_view reply) {
    resume();
    // Python keeps it until the next one.
    if (received_data.capacity() > kept_size) std::string().swap(received_data);
    const bool proper = is_reply(reply);
    if (!proper) log_info("not a reply: " + asyncore::repr(reply), "error");
    const auto about = std::exchange(deferred_, nothing);
    if (about == nothing || !proper || reply[0] != '2') {
        if (about == sender) mailfrom.clear();
        if (about == recipient) rcpttos.pop_back();
        push(proper ? reply : not_processed);
    } else {
        about == sender ? answer_MAIL() : answer_RCPT();
    }
    stop_when_idle();
}

// A channel with nothing in hand says 421 now; one in the middle of a message does so after it, or when the bound has
// come.
void SMTPChannel::stop(asyncore::clock::time_point bound) {
    stop_by_ = bound;
    stop_when_idle();
}

// Asked whenever a reply is out: that is when a message or a command is no longer in hand.
void SMTPChannel::stop_when_idle() {
    if (stop_by_ && !in_hand()) say_goodbye("421 Error: server is shutting down");
}

// The last reply. Input is over, so what the client has sent after QUIT is ignored; Python executes it.
void SMTPChannel::say_goodbye(std::string_view reply) {
    if (input_over()) return;
    push(reply);
    close_when_done();
    end_input();
}

// The nearest of: input that may go on, a look at a paused client, the bound of stop(), and the two idle clocks. The
// last two stand still while a reply is owed: that wait is not the client's fault.
asyncore::clock::time_point SMTPChannel::deadline() {
    auto due = left_behind_ ? asyncore::at_once : async_chat::deadline();
    if (stop_by_) due = std::min(due, *stop_by_);
    if (paused()) return due;
    if (ends(idle_timeout)) due = std::min(due, active_ + idle_timeout);
    if (smtp_state == DATA && !input_over() && ends(data_timeout)) due = std::min(due, data_since_ + data_timeout);
    return due;
}

// What deadline() names has come due, in the same order. A client that has been told goodbye, or does not take its
// replies, gets no more time.
void SMTPChannel::handle_timeout() {
    if (left_behind_) return left_behind_.reset();
    if (async_chat::deadline() <= asyncore::clock::now()) return gather([this] { async_chat::handle_timeout(); });
    if (input_over() || queued() > 0) return close();
    const bool stopped = stop_by_ && *stop_by_ <= asyncore::clock::now();
    say_goodbye(stopped ? "421 Error: server is shutting down" : "421 Error: timeout exceeded");
    active_ = asyncore::clock::now();
    if (stopped) close();
}

// Output that goes is a sign of life. A client that fetches its replies byte by byte is idle all the same.
void SMTPChannel::handle_write() {
    const std::size_t before = queued();
    async_chat::handle_write();
    fetched_ += before - std::min(before, queued());
    if (queued() > 0 && fetched_ < 4096) return;
    active_ = asyncore::clock::now();
    fetched_ = 0;
}

// The client has closed its side: what it is owed is sent before ours is closed. (Python drops it.)
void SMTPChannel::handle_close() {
    if (input_over() || queued() == 0) return close();
    close_when_done();
    end_input();
}

// The token, if there is one, answers no client from now on. The replies of the event under way are still sent.
void SMTPChannel::close() {
    if (owed_) std::exchange(owed_, nullptr)->channel = nullptr;
    // Python has sent by now what was pushed in this event.
    if (std::exchange(gathering_, false)) succeeds([this] { initiate_send(); });
    async_chat::close();
}

// Python asks for the attribute smtp_VERB. A table does the same: its pointers are to virtual functions, so an override
// of smtp_MAIL is found, and a new verb takes an override of this function.
SMTPChannel::command SMTPChannel::find_command(std::string_view verb) {
    static constexpr std::pair<std::string_view, command> table[] = {
        {"MAIL", &SMTPChannel::smtp_MAIL}, {"RCPT", &SMTPChannel::smtp_RCPT}, {"DATA", &SMTPChannel::smtp_DATA},
        {"EHLO", &SMTPChannel::smtp_EHLO}, {"HELO", &SMTPChannel::smtp_HELO}, {"QUIT", &SMTPChannel::smtp_QUIT},
        {"RSET", &SMTPChannel::smtp_RSET}, {"NOOP", &SMTPChannel::smtp_NOOP}, {"HELP", &SMTPChannel::smtp_HELP},
        {"VRFY", &SMTPChannel::smtp_VRFY}, {"EXPN", &SMTPChannel::smtp_EXPN}};
    for (const auto& [name, method] : table)
        if (name == verb) return method;
    return nullptr;
}

// As in Python, a client greets once: RFC 5321 would let it greet again.
void SMTPChannel::smtp_HELO(argument arg) {
    if (!arg || arg->empty()) return push("501 Syntax: HELO hostname");
    if (!seen_greeting.empty()) return push("503 Duplicate HELO/EHLO");
    _set_rset_state();
    seen_greeting = *arg;
    push("250 " + fqdn);
}

// Python's order: SIZE, 8BITMIME, SMTPUTF8, HELP; what a subclass adds stands before HELP. MAIL may be longer for each
// parameter that is offered here: 26 bytes for SIZE, 10 for SMTPUTF8.
void SMTPChannel::smtp_EHLO(argument arg) {
    if (!arg || arg->empty()) return push("501 Syntax: EHLO hostname");
    if (!seen_greeting.empty()) return push("503 Duplicate HELO/EHLO");
    const auto more = extensions();   // first: a subclass's function may throw
    _set_rset_state();
    seen_greeting = *arg;
    extended_smtp = true;
    push("250-" + fqdn);
    std::size_t room = 0;   // that MAIL needs for its parameters
    if (data_size_limit) {
        push("250-SIZE " + std::to_string(data_size_limit));
        room += 26;
    }
    if (!_decode_data) push("250-8BITMIME");
    if (enable_SMTPUTF8) {
        push("250-SMTPUTF8");
        room += 10;
    }
    if (room) command_size_limits["MAIL"] = command_size_limit + room;
    for (const auto& extension : more) push("250-" + extension);
    push("250 HELP");
}

void SMTPChannel::smtp_NOOP(argument arg) { push(arg && !arg->empty() ? "501 Syntax: NOOP" : "250 OK"); }

void SMTPChannel::smtp_QUIT(argument) { say_goodbye("221 Bye"); }

// The keyword has its colon, "FROM:", and no space need follow it.
std::string_view SMTPChannel::_strip_command_keyword(std::string_view keyword, std::string_view arg) {
    if (upper(arg.substr(0, keyword.size())) != keyword) return {};
    return strip(arg.substr(keyword.size()));
}

// Python's parser is lenient, and so is this one (see parse_address). Control characters are refused before and after
// it: nothing that a client sends may end a line of the next server's.
std::optional<std::pair<std::string, std::string_view>> SMTPChannel::_getaddr(std::string_view arg) {
    if (arg.empty()) return std::pair(std::string(), arg);
    // Python accepts control characters, and closes the connection when it can't read the address.
    if (std::any_of(arg.begin(), arg.end(), [](char c) { return is_control(c) && c != '\t'; })) return std::nullopt;
    std::pair<std::string, std::string_view> parsed;
    if (!parse_address(arg, parsed.first, parsed.second) || parsed.first.find('\t') != arg.npos) return std::nullopt;
    return parsed;
}

// A word is NAME or NAME=VALUE, in upper case already. The parameters are views of the words.
std::optional<SMTPChannel::parameters> SMTPChannel::_getparams(const std::vector<std::string>& params) {
    const auto is_alnum = [](char c) { return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z'); };
    parameters result;
    result.reserve(params.size());
    for (const std::string_view param : params) {
        const auto eq = std::find_if_not(param.begin(), param.end(), is_alnum);
        const auto name = param.substr(0, static_cast<std::size_t>(eq - param.begin()));
        std::optional<std::string_view> value;
        if (eq != param.end()) value = param.substr(name.size() + 1);
        if (name.empty() || (value && (*eq != '=' || value->empty() || !is_ascii(*value)))) return std::nullopt;
        result.emplace_back(name, value);
    }
    return result;
}

// One table for HELP and for the 501 replies: a subclass tells of its verb here, and HELP knows it.
std::string SMTPChannel::syntax(std::string_view verb) const {
    static constexpr std::pair<std::string_view, std::string_view> table[] = {{"EHLO", "EHLO hostname"},
                                                                              {"HELO", "HELO hostname"},
                                                                              {"MAIL", "MAIL FROM: <address>"},
                                                                              {"RCPT", "RCPT TO: <address>"},
                                                                              {"DATA", "DATA"},
                                                                              {"RSET", "RSET"},
                                                                              {"NOOP", "NOOP"},
                                                                              {"QUIT", "QUIT"},
                                                                              {"VRFY", "VRFY <address>"}};
    for (const auto& [name, text] : table)
        if (name == verb)
            return std::string(text) +
                   (extended_smtp && (verb == "MAIL" || verb == "RCPT") ? " [SP <mail-parameters>]" : "");
    return "";
}

// The list is Python's to the byte, so a verb of a subclass is not in it.
void SMTPChannel::smtp_HELP(argument arg) {
    const std::string known = "Supported commands: EHLO HELO MAIL RCPT DATA RSET NOOP QUIT VRFY";
    if (!arg || arg->empty()) return push("250 " + known);
    const std::string text = syntax(upper(*arg));
    push(text.empty() ? "501 " + known : "250 Syntax: " + text);
}

// 252 tells a stranger nothing about who has a mailbox here (RFC 5321, 3.5.3 and 7.3).
void SMTPChannel::smtp_VRFY(argument arg) {
    if (!arg || arg->empty()) return push("501 Syntax: VRFY <address>");
    const auto parsed = _getaddr(*arg);
    if (!parsed) return push("501 Syntax: VRFY <address>");
    if (parsed->first.empty()) return push("502 Could not VRFY " + std::string(*arg));
    push("252 Cannot VRFY user, but will accept message and attempt delivery");
}

// Python's order of checks, which a client can see: syntax before "nested MAIL", parameters in the order BODY,
// SMTPUTF8, SIZE, unknown ones. Nothing is noted until all of them are passed. When refuse_MAIL() has deferred, the
// sender is noted and answer() has the last word.
void SMTPChannel::smtp_MAIL(argument arg) {
    if (seen_greeting.empty()) return push("503 Error: send HELO first");
    if (debugging()) DEBUGSTREAM << "===> MAIL " << (arg ? asyncore::repr(*arg) : "None") << std::endl;
    const std::string syntaxerr = "501 Syntax: " + syntax("MAIL");
    if (!arg) return push(syntaxerr);
    auto parsed = _getaddr(_strip_command_keyword("FROM:", *arg));
    if (!parsed || parsed->first.empty()) return push(syntaxerr);
    if (!extended_smtp && !parsed->second.empty()) return push(syntaxerr);
    if (!mailfrom.empty()) return push("503 Error: nested MAIL command");
    const std::vector<std::string> words = split(upper(parsed->second));
    auto params = _getparams(words);
    if (!params) return push(syntaxerr);
    // Takes a parameter out, so that those that are left over at the end are unknown.
    const auto pop = [&params](std::string_view name) {
        std::optional<std::optional<std::string_view>> value;   // none at all: not given
        for (const auto& it : *params)
            if (it.first == name) value = it.second;
        const auto same = [name](const auto& it) { return it.first == name; };
        params->erase(std::remove_if(params->begin(), params->end(), same), params->end());
        return value;
    };
    if (!_decode_data) {
        if (const auto body = pop("BODY"))
            if (*body != "7BIT" && *body != "8BITMIME")
                return push("501 Error: BODY can only be one of 7BIT, 8BITMIME");
    }
    bool utf8 = false;
    if (enable_SMTPUTF8) {
        if (const auto smtputf8 = pop("SMTPUTF8")) {
            if (*smtputf8) return push("501 Error: SMTPUTF8 takes no arguments");
            utf8 = true;
        }
    }
    std::size_t declared = 0;
    if (const auto size = pop("SIZE")) {
        const std::string_view digits = size->value_or("");
        if (digits.empty() || digits.find_first_not_of("0123456789") != digits.npos) return push(syntaxerr);
        for (const char digit : digits)   // a number that is too large for its type is the largest of it
            declared = declared > SIZE_MAX / 10 - 1 ? SIZE_MAX : declared * 10 + static_cast<std::size_t>(digit - '0');
        if (data_size_limit && declared > data_size_limit)
            return push("552 Error: message size exceeds fixed maximum message size");
    }
    if (!params->empty()) return push("555 MAIL FROM parameters not recognized or not implemented");
    if (refused(refuse_MAIL(parsed->first))) return;
    mailfrom = std::move(parsed->first);
    mail_options = words;
    require_SMTPUTF8 = utf8;
    declared_size_ = std::min(declared, DATA_SIZE_DEFAULT);
    if (debugging()) DEBUGSTREAM << "sender: " << asyncore::repr(mailfrom) << std::endl;
    if (asked_)
        deferred_ = sender;
    else
        answer_MAIL();
}

// The limit comes before refuse_RCPT(), which may be slow: it is not asked about what can't be taken anyway. A
// recipient whose reply is deferred is noted at once, and answer() takes it back when it is refused.
void SMTPChannel::smtp_RCPT(argument arg) {
    if (seen_greeting.empty()) return push("503 Error: send HELO first");
    if (debugging()) DEBUGSTREAM << "===> RCPT " << (arg ? asyncore::repr(*arg) : "None") << std::endl;
    if (mailfrom.empty()) return push("503 Error: need MAIL command");
    const std::string syntaxerr = "501 Syntax: " + syntax("RCPT");
    if (!arg) return push(syntaxerr);
    auto parsed = _getaddr(_strip_command_keyword("TO:", *arg));
    if (!parsed || parsed->first.empty()) return push(syntaxerr);
    if (!extended_smtp && !parsed->second.empty()) return push(syntaxerr);
    const std::vector<std::string> words = split(upper(parsed->second));
    const auto params = _getparams(words);
    if (!params) return push(syntaxerr);
    if (!params->empty()) return push("555 RCPT TO parameters not recognized or not implemented");
    if (rcpt_limit && rcpttos.size() >= rcpt_limit) return push("452 Error: too many recipients");
    if (refused(refuse_RCPT(parsed->first))) return;
    rcpttos.push_back(std::move(parsed->first));
    rcpt_options = words;
    if (debugging()) DEBUGSTREAM << "recips: " << list_repr(rcpttos) << std::endl;
    if (asked_)
        deferred_ = recipient;
    else
        answer_RCPT();
}

void SMTPChannel::smtp_RSET(argument arg) {
    if (arg && !arg->empty()) return push("501 Syntax: RSET");
    _set_rset_state();
    push("250 OK");
}

// The reply is pushed first: when there is no memory for it, the client is still where it was.
void SMTPChannel::smtp_DATA(argument arg) {
    if (seen_greeting.empty()) return push("503 Error: send HELO first");
    if (rcpttos.empty()) return push("503 Error: need RCPT command");
    if (arg && !arg->empty()) return push("501 Syntax: DATA");
    push("354 End data with <CR><LF>.<CR><LF>");
    smtp_state = DATA;
    set_terminator("\r\n.\r\n");
    // RFC 5321, 4.1.1.4: the CR LF of the DATA line may also be the first half of CR LF . CR LF, and a message that is
    // only a dot is an empty one. So it goes back in front of the input. Python waits for another one for ever.
    unread("\r\n");
    data_starts_ = true;
    data_since_ = active_;
}

void SMTPChannel::smtp_EXPN(argument) { push("502 EXPN not implemented"); }

// ---------------------------------------------------------------------------------------------------------
// SMTPServer
// ---------------------------------------------------------------------------------------------------------

namespace {

constexpr char too_many_connections[] = "421 Error: too many connections\r\n";

int open_spare() { return ::open("/dev/null", O_RDONLY | O_CLOEXEC); }

}   // namespace

// A name may stand for several addresses, and a host may lack the first: localhost is ::1 in many files. Python gives
// up there. An address that is in use is an error at once.
SMTPServer::SMTPServer(const address& localaddr, const address& remoteaddr, const options& with)
    : dispatcher(nullptr, with.map), _localaddr(localaddr), _remoteaddr(remoteaddr), settings(with) {
    settings.map = _map;
    if (settings.enable_SMTPUTF8 && settings.decode_data)
        throw std::invalid_argument("decode_data and enable_SMTPUTF8 cannot be set to True at the same time");
    const auto candidates = asyncore::getaddrinfo(localaddr);
    for (const auto& candidate : candidates) {
        try {
            create_socket(candidate.family);
            set_reuse_addr();
            dispatcher::bind(candidate);
            break;
        } catch (const std::system_error& error) {
            // Python gives up here; a host without IPv6 may well call itself ::1 first.
            const bool other_family = error.code() == std::errc::address_family_not_supported ||
                                      error.code() == std::errc::address_not_available;
            if (!other_family || &candidate == &candidates.back()) throw;
        }
    }
    addr = localaddr;
    dispatcher::listen(SOMAXCONN);                                    // Python: 5, and a burst of clients is dropped
    if (settings.fqdn.empty()) settings.fqdn = asyncore::getfqdn();   // Python: once for each client
    spare_ = asyncore::socket_type(open_spare());
    if (!debugging()) return;
    const std::time_t now = std::time(nullptr);
    DEBUGSTREAM << "SMTPServer started at " << std::ctime(&now) << "\tLocal addr: " << localaddr.repr()
                << "\n\tRemote addr:" << remoteaddr.repr() << std::endl;
}

// The channels belong to the map and may be running: they are closed, and told that there is no server any more.
SMTPServer::~SMTPServer() {
    for (SMTPChannel* channel : std::exchange(channels_, {})) {
        channel->smtp_server = nullptr;
        succeeds([channel] { channel->close(); });   // what it has to say comes too late
    }
}

std::unique_ptr<SMTPChannel> SMTPServer::channel_class(std::unique_ptr<asyncore::socket_type> sock,
                                                       const address& from) {
    return std::make_unique<SMTPChannel>(*this, std::move(sock), from);
}

// A channel that says goodbye may close, and its close() may close others: so the set is searched again after each,
// from where it was.
void SMTPServer::stop(std::chrono::milliseconds grace) {
    const auto bound = asyncore::clock::now() + std::min<std::chrono::milliseconds>(grace, for_ever);
    succeeds([this] { close(); });   // it listens no more, whatever close() says
    for (auto next = channels_.begin(); next != channels_.end();) {
        SMTPChannel& channel = **next;
        deferred_reply::owed::guarded(channel, [&] { channel.stop(bound); });
        next = channels_.upper_bound(&channel);   // which may be gone
    }
}

// A listener has a deadline only while it rests: see pause_accepting().
asyncore::clock::time_point SMTPServer::deadline() {
    return accepting_paused_ ? accept_again_at_ : asyncore::clock::time_point::max();
}

// Python takes one client a pass, and closes the listener when anything in here fails. A hundred at most, so that
// clients that are connected have their turn. The errors that are thrown on mean that this is no listener any more;
// others concern one client, or are over soon.
void SMTPServer::handle_accept() {
    // What is called may destroy this server: the map knows.
    const asyncore::map_type& map = *_map;
    const int fd = _fileno;
    const auto registration = map.registration(fd);
    for (int i = 0; i < 100 && map.registration(fd) == registration && accepting; ++i) {
        std::optional<std::pair<std::unique_ptr<asyncore::socket_type>, address>> pair;
        try {
            pair = accept();
        } catch (const std::system_error& error) {
            const int err = error.code().value();
            if (err == EBADF || err == EINVAL || err == ENOTSOCK || err == EOPNOTSUPP || err == EFAULT) throw;
            log_exception("cannot accept a client of");
            return turn_away();
        } catch (const std::bad_alloc&) {
            return pause_accepting();
        }
        if (!pair) return;
        try {
            handle_accepted(std::move(pair->first), pair->second);
        } catch (const asyncore::ExitNow&) {
            throw;
        } catch (...) {
            if (map.registration(fd) == registration) log_exception("uncaptured C++ exception in a new channel of");
        }
    }
}

// Accepts no client for a moment: the listener stays readable, and the loop would spin.
void SMTPServer::pause_accepting() {
    accepting_paused_ = true;
    accept_again_at_ = asyncore::clock::now() + std::chrono::milliseconds(100);
}

// Descriptors have run out, most likely. The spare one is given up for the client that waits, who is told and closed;
// then it is taken back.
void SMTPServer::turn_away() {
    pause_accepting();
    succeeds([this] {
        spare_.close();
        if (auto pair = accept()) pair->first->send(too_many_connections);
    });
    spare_ = asyncore::socket_type(open_spare());
}

// The map owns the channel before start() is called, so that start() and what it calls may close it.
void SMTPServer::handle_accepted(std::unique_ptr<asyncore::socket_type> sock, const address& from) {
    if (debugging()) DEBUGSTREAM << "Incoming connection from " << from.repr() << std::endl;
    if (settings.connection_limit && channels_.size() >= settings.connection_limit) {
        sock->send(too_many_connections);
        return;
    }
    auto made = channel_class(std::move(sock), from);
    if (!made) return;
    SMTPChannel& channel = *made;
    channel._map->own(std::move(made));
    try {
        channel.start();
    } catch (...) {
        channel.close();
        throw;
    }
}

std::optional<std::string> SMTPServer::process_message(const address&, const std::string&,
                                                       const std::vector<std::string>&, std::string&&,
                                                       const message_options&) {
    throw asyncore::NotImplementedError("process_message() must be implemented in a subclass");
}

// ---------------------------------------------------------------------------------------------------------
// DebuggingServer
// ---------------------------------------------------------------------------------------------------------

namespace {

bool is_plain(char c) { return (c >= ' ' && c < 0x7f) || c == '\t'; }

// Bytes at the front that are printed as they are. Eight are looked at in one word: a byte below the space borrows its
// top bit when that is taken away, DEL gets it when 1 is added, and what is not ASCII has it. A neighbour's borrow or
// carry may set it too; the bytes are then looked at one by one, which is slower and not wrong.
std::size_t plain_length(std::string_view text) {
    constexpr std::uint64_t each = 0x0101010101010101;
    std::size_t size = 0;
    while (size < text.size() && is_plain(text[size]) && size < 4) ++size;
    if (size < 4) return size;
    for (std::uint64_t eight; size + sizeof eight <= text.size(); size += sizeof eight) {
        std::memcpy(&eight, text.data() + size, sizeof eight);
        if ((eight | (eight - each * ' ') | (eight + each)) & each * 0x80) break;
    }
    while (size < text.size() && is_plain(text[size])) ++size;
    return size;
}

// Takes a character off the text and prints it, but nothing that could drive a terminal: a control character or an
// invalid byte shows as \xNN. Four bytes are room enough.
char* print_character(char* to, std::string_view& text) {
    const auto byte = static_cast<unsigned char>(text[0]);
    const std::size_t length = byte < 0xc2 ? 0 : utf8_length(text);
    const bool c1 = byte == 0xc2 && length == 2 && static_cast<unsigned char>(text[1]) < 0xa0;
    if (length == 0 || c1) {
        *to++ = '\\', *to++ = 'x';
        *to++ = "0123456789abcdef"[byte >> 4], *to++ = "0123456789abcdef"[byte & 15];
        text.remove_prefix(1);
    } else {
        to = std::copy_n(text.data(), length, to);
        text.remove_prefix(length);
    }
    return to;
}

// The length of the line end that the text begins with, as splitlines() of bytes or of str has it; or 0.
std::size_t newline_length(std::string_view text, bool str) {
    if (text[0] == '\n') return 1;
    if (text[0] == '\r') return text.substr(0, 2) == "\r\n" ? 2 : 1;
    if (!str) return 0;
    if (text[0] == '\v' || text[0] == '\f' || (text[0] >= 0x1c && text[0] <= 0x1e)) return 1;
    if (text[0] != '\xc2' && text[0] != '\xe2') return 0;
    for (const std::string_view wide : {"\u0085", "\u2028", "\u2029"})
        if (text.substr(0, wide.size()) == wide) return wide.size();
    return 0;
}

// The host of a client, for X-Peer.
std::string peer_host(const address& peer) { return peer.family == AF_UNIX ? "unix" : peer.host; }

}   // namespace

// Line by line, with X-Peer before the first empty one. Lines end where Python's splitlines() ends them, which is at
// more places for text than for bytes. The text goes through a buffer, as a stream is slow for single characters. Its
// last four bytes are room for one character.
void DebuggingServer::_print_message_content(const address& peer, std::string_view data, std::ostream& out) const {
    std::string text(16384, '\0');
    bool inheaders = true;
    std::size_t newline = 1;   // bytes of the line end that was met; 0: in a line
    while (!data.empty()) {
        char *to = text.data(), *const full = to + text.size() - 4;
        while (!data.empty() && to < full) {
            if (is_plain(data[0])) {
                const std::size_t plain = plain_length(data.substr(0, static_cast<std::size_t>(full - to)));
                to = std::copy_n(data.data(), plain, to);
                data.remove_prefix(plain);
                newline = 0;
                continue;
            }
            const std::size_t end = newline_length(data, settings.decode_data);
            if (end > 0 && newline > 0 && std::exchange(inheaders, false)) {
                out.write(text.data(), to - text.data()) << "X-Peer: " << peer_host(peer) << '\n';
                to = text.data();
            }
            if (end > 0) *to++ = '\n';
            if (end == 0) to = print_character(to, data);
            newline = end;
            data.remove_prefix(end);
        }
        out.write(text.data(), to - text.data());
    }
    if (newline == 0) out << '\n';
}

std::optional<std::string> DebuggingServer::process_message(const address& peer, const std::string&,
                                                            const std::vector<std::string>&, std::string&& data,
                                                            const message_options& kwargs) {
    auto& out = std::cout;
    out << "---------- MESSAGE FOLLOWS ----------\n";
    if (!kwargs.mail_options.empty()) out << "mail options: " << list_repr(kwargs.mail_options) << '\n';
    if (!kwargs.rcpt_options.empty()) out << "rcpt options: " << list_repr(kwargs.rcpt_options) << "\n\n";
    _print_message_content(peer, data, out);
    out << "------------ END MESSAGE ------------" << std::endl;
    // The client must not hear 250 for a message that was printed nowhere, and the next one would fare no better.
    if (!out) throw asyncore::ExitNow("cannot write the message to stdout");
    return std::nullopt;
}

// ---------------------------------------------------------------------------------------------------------
// ProxyChannel
// ---------------------------------------------------------------------------------------------------------

// One message goes through two sessions: the client's with us, and ours with the next server. (Mailman is a second
// next server: each has a `transaction`, and a recipient belongs to the one that route() names.)
//
//     client               ProxyChannel, PureProxy              transaction              next server
//     MAIL FROM:<a>  ----> smtp_MAIL, answer_MAIL: defer() ---> begin: RSET, or ------>  220, EHLO
//                                                               open; say_MAIL ------->  MAIL FROM:<a>
//     250 OK         <---- reply.answer() <-------------------- begun = true <---------  250
//     RCPT TO:<b>    ----> smtp_RCPT, answer_RCPT: defer() ---> say_RCPT ------------->  RCPT TO:<b>
//     550 no such    <---- reply.answer(refusal()) <----------- <----------------------  550 no such
//     DATA           ----> smtp_DATA
//     354            <---- (our own: the message is taken whole before any of it goes on)
//     the message    ----> process_message: X-Peer, relay ----> session->data -------->  DATA, the message
//     250 OK         <---- reply.answer(final_answer()) <------ <----------------------  250
//
// While a reply is deferred, the channel executes nothing: so a transaction never has two commands under way. What is
// accepted here has been accepted there: 250 goes to the client only after the next server's 250. When a session is
// lost, refusal() says 451 for that recipient. If the client has a 250 already that the loss makes untrue, the whole
// transaction is over: see lose(). The session stays open for the client's next message, and RSET comes before that
// when the server may still know of this one (`stale`).

namespace {

constexpr char not_available[] = "451 Error: the next server is not available";

// Whether a reply is a no that the client can be told as it is. 421 is about our connection, and not the client's.
bool is_refusal(const reply& answer) { return answer.code >= 400 && answer.code <= 599 && answer.code != 421; }

// What the client is told of the reply to its message.
std::string final_answer(const reply& answer) {
    return answer.code == 250 || is_refusal(answer) ? answer.line() : not_available;
}

}   // namespace

ProxyChannel::ProxyChannel(PureProxy& server, std::unique_ptr<asyncore::socket_type> sock, const address& from)
    : SMTPChannel(server, std::move(sock), from) {
    no_delay(*conn);   // replies come one by one: none shall wait for another
}

// Without their client the sessions have no use.
void ProxyChannel::close() {
    SMTPChannel::close();
    for (auto& it : transactions_) it.abandon();
}

// Brings the destination to where it takes recipients: `then` gets its reply to MAIL, or what came in between. A
// session that was idle may be lost just as MAIL is said, for the other side's patience is over: a new one is opened,
// once. Nothing has been told of the new transaction by then, so the client need not know.
void ProxyChannel::transaction::begin(SMTP::handler then) {
    const SMTP::handler unless_lost = [this, then](const reply& said) {
        if (said.code >= 0 && said.code != 421) return then(said);
        abandon();
        auto made = proxy().new_session(to);
        session = made.get();
        made->on_close = [this] { session = nullptr; };
        made->open(proxy().address_of(to), [this, then](const reply& answer) {
            if (answer.code == 250) return say_MAIL(then);
            abandon();
            then(answer);
        });
        if (made->_fileno >= 0) channel._map->own(std::move(made));
    };
    reset([this, unless_lost] { say_MAIL(unless_lost); });
}

// Makes the destination forget what it has heard. When the connection is lost, so is its memory.
void ProxyChannel::transaction::reset(const std::function<void()>& then) {
    begun = false;
    accepted.clear();
    if (!std::exchange(stale, false) || !session) return then();
    session->rset([this, then](const reply& answer) {
        if (answer.code != 250) abandon();
        then();
    });
}

// A recipient may need SMTPUTF8 as well as the sender: MAIL is said late to a side of MailmanProxy, and said again by
// answer_RCPT(), and each time the client's last recipient is the reason. The session is stale from here on.
void ProxyChannel::transaction::say_MAIL(SMTP::handler then) {
    if (!session) return then({});
    std::vector<std::string> with;
    const bool last_utf8 = !channel.rcpttos.empty() && !is_ascii(channel.rcpttos.back());
    const bool needs_utf8 = last_utf8 || !is_ascii(channel.mailfrom);
    if (!pick_options(*session, channel.mail_options, true, needs_utf8, with)) return then(no_SMTPUTF8);
    utf8 = !with.empty() && with.back() == "SMTPUTF8";
    stale = true;
    mailfrom = channel.mailfrom;
    session->mail(mailfrom, with, [this, then](const reply& answer) {
        begun = answer.code == 250;
        then(answer);
    });
}

// Names the client's last recipient. 251, "will forward", is a yes like 250, and the client need not tell them apart.
void ProxyChannel::transaction::say_RCPT(SMTP::handler then) {
    const std::string& recipient = channel.rcpttos.back();
    if (!session) return then({});
    if (!utf8 && !is_ascii(recipient))
        return then(session->has_extn("SMTPUTF8") ? reply{550, "Error: SMTPUTF8 was not declared"} : no_SMTPUTF8);
    session->rcpt(proxy().address_for(to, recipient), [then = std::move(then)](reply answer) {
        if (answer.code == 251) answer.code = 250;
        then(answer);
    });
}

// What the client is told when the reply was not a yes. A proper no is passed on. Anything else ends the session. It
// ends the client's transaction too, if the client had a 250 for something that is lost with the session.
std::string ProxyChannel::transaction::refusal(const reply& said) {
    if (is_refusal(said)) return said.line();
    if (debugging()) DEBUGSTREAM << "got " << said.code << ' ' << asyncore::repr(said.text) << std::endl;
    abandon();
    begun = false;
    if (proxy().asks_at_MAIL() || !accepted.empty()) channel.lose();
    return not_available;
}

// The pointer goes first: on_close is not called for an abandoned session.
void ProxyChannel::transaction::abandon() {
    if (SMTP* ended = std::exchange(session, nullptr)) ended->abandon();
}

// The client has to begin again with MAIL: until then smtp_RCPT() and smtp_DATA() say 451.
void ProxyChannel::lose() {
    _set_post_data_state();
    lost_ = true;
}

// The handlers hold `this` and `it` without owning them. That is safe: close() abandons the sessions, and an abandoned
// session calls no handler.
void ProxyChannel::answer_MAIL() {
    lost_ = false;
    for (auto& it : transactions_) it.begun = false, it.accepted.clear();   // of a transaction before
    if (!proxy().asks_at_MAIL()) return push("250 OK");
    transaction& it = of(PureProxy::side::upstream);
    it.begin([this, &it, reply = defer()](const auto& said) {
        if (said.code == 250) return reply.answer("250 OK");
        _set_post_data_state();
        reply.answer(it.refusal(said));
    });
}

// A destination without an address is MailmanProxy's without LMTP: list_exists() has said yes, and that is enough.
void ProxyChannel::answer_RCPT() {
    PureProxy::side to = PureProxy::side::upstream;
    try {
        to = proxy().route(rcpttos.back());
    } catch (const std::system_error&) {
        log_exception("no way to tell where a recipient's mail goes for");
        rcpttos.pop_back();
        return push(not_available);
    }
    if (proxy().address_of(to).none()) return push("250 OK");
    transaction& it = of(to);
    const SMTP::handler answered = [this, &it, reply = defer()](const auto& said) {
        if (said.code == 250) {
            it.accepted.push_back(rcpttos.back());
            return reply.answer("250 OK");
        }
        rcpttos.pop_back();
        reply.answer(it.refusal(said));
    };
    // MAIL is said again for the sake of a recipient that needs SMTPUTF8, as long as it is the first one.
    if (it.begun && (it.utf8 || !it.accepted.empty() || is_ascii(rcpttos.back()))) return it.say_RCPT(answered);
    it.begin([&it, answered](const auto& said) {
        if (said.code == 250) return it.say_RCPT(answered);
        answered(said);
    });
}

// No token is left that could pass a reply on: memory ran out, for one. What the next servers know is uncertain.
void ProxyChannel::answer_lost() {
    for (auto& it : transactions_) it.abandon();
    lose();
    answer(not_available);
}

// The client hears 250 when both sides have forgotten. A side that has heard nothing of the transaction is not asked.
void ProxyChannel::smtp_RSET(argument arg) {
    if (arg && !arg->empty()) return SMTPChannel::smtp_RSET(arg);
    lost_ = false;
    transactions_[0].reset([this, reply = defer()] {
        transactions_[1].reset([this, reply] {
            _set_rset_state();
            reply.answer("250 OK");
        });
    });
}

// After a loss, and until a new transaction, the rest of the old one gets 451: 503 would tell the client that its
// recipients are refused for good.
void ProxyChannel::smtp_RCPT(argument arg) {
    if (lost_ && mailfrom.empty()) return push(not_available);
    SMTPChannel::smtp_RCPT(arg);
}

// A session may have been lost since its last RCPT. The client is told before it sends the message for nothing.
void ProxyChannel::smtp_DATA(argument arg) {
    for (const auto& it : transactions_)
        if (!it.session && !it.accepted.empty()) lose();
    if (lost_ && mailfrom.empty()) return push(not_available);
    SMTPChannel::smtp_DATA(arg);
}

// ---------------------------------------------------------------------------------------------------------
// PureProxy
// ---------------------------------------------------------------------------------------------------------

namespace {

std::string lower(std::string text) {
    for (char& c : text)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    return text;
}

// What a proxy has to know of a message's header. It ends at the first line that is sent as an empty one; Python looks
// for \n\n, and takes \r\r for text.
struct header {
    std::size_t end = 0;   // where another line goes in
    int hops = 0;          // X-Peer lines: proxies that it came through
    bool from = false, date = false;

    // A name counts in any case, up to its colon. The loop ends at an empty line, or with the message.
    explicit header(std::string_view message) {
        while (const std::size_t length = line_length(message.substr(end))) {
            const std::string_view line = message.substr(end, length);
            const auto is = [line](std::string_view name) {
                const auto same = [](char a, char b) { return a == b || (a >= 'A' && a + ('a' - 'A') == b); };
                return line.size() >= name.size() && std::equal(name.begin(), name.end(), line.begin(), same);
            };
            hops += is("X-PEER:");
            from = from || is("FROM:");
            date = date || is("DATE:");
            end += length;
            if (end < message.size()) end += is_crlf(message.substr(end)) ? 2 : 1;
        }
    }
};

constexpr int most_hops = 50;
constexpr char too_many_hops[] = "554 Error: too many hops";

// Whether a connection to `to` comes to this listener: the port is the same, and so is the address. A listener on all
// addresses takes those of this host, and they are the ones that a socket can be bound to.
bool is_own(const asyncore::socket_type& listener, address to) {
    const address own = listener.getsockname();
    const auto plain = [](std::string host) {   // IPv4, when it is IPv4 in IPv6
        return host.compare(0, 7, "::ffff:") == 0 && host.find('.') != host.npos ? host.substr(7) : host;
    };
    std::string there = plain(to.host);
    if (there == "0.0.0.0") there = "127.0.0.1";   // where a connection to these goes
    if (there == "::") there = "::1";
    if (to.port == 0 && to.family != AF_UNIX) to.port = 25;
    if (to.port != own.port || there == plain(own.host)) return to.port == own.port;
    if (own.host != "::" && (own.host != "0.0.0.0" || there.find(':') != there.npos)) return false;
    to.port = 0;
    return succeeds([&] { asyncore::socket_type(to.family, SOCK_STREAM).bind(to); });   // so it is one of this host
}

// A proxy that sends to itself would pass a message round until its X-Peer lines are too many.
void check_next(const SMTPServer& server, const address& next) {
    std::vector<address> targets;
    if (!next.none()) succeeds([&] { targets = asyncore::getaddrinfo(next); });   // the name may not be known yet
    for (const auto& target : targets)
        if (is_own(*server.socket, target)) throw std::invalid_argument("it would send to itself: " + next.str());
}

}   // namespace

// The map owns the sessions of deliver(), and they may outlive this; their handlers know it.
PureProxy::~PureProxy() {
    for (SMTP* session : std::exchange(deliveries_, {})) session->abandon();
}

void PureProxy::check_settings() const { check_next(*this, _remoteaddr); }

// The bound is shared with the sessions, which may outlive this.
void PureProxy::stop(std::chrono::milliseconds grace) {
    *stop_by_ = asyncore::clock::now() + std::min<std::chrono::milliseconds>(grace, for_ever);
    SMTPServer::stop(grace);
}

std::unique_ptr<SMTPChannel> PureProxy::channel_class(std::unique_ptr<asyncore::socket_type> sock,
                                                      const address& from) {
    return std::make_unique<ProxyChannel>(*this, std::move(sock), from);
}

// Many servers refuse a name without a dot in EHLO. An address literal then takes its place: see own_name().
std::unique_ptr<SMTP> PureProxy::make_session(side to) const {
    auto session = to == side::lists ? std::make_unique<LMTP>(settings.map, settings.upstream)
                                     : std::make_unique<SMTP>(settings.map, settings.upstream);
    if (settings.fqdn.find('.') != settings.fqdn.npos) session->local_hostname = settings.fqdn;
    return session;
}

// make_session() may be a subclass's: what each session needs is added here.
std::unique_ptr<SMTP> PureProxy::new_session(side to) const {
    auto session = make_session(to);
    session->stop_by_ = stop_by_;
    return session;
}

const address& PureProxy::address_of(side to) const { return to == side::lists ? settings.mailman_lmtp : _remoteaddr; }

std::optional<std::string> PureProxy::process_message(const address& peer, const std::string& mailfrom,
                                                      const std::vector<std::string>& rcpttos, std::string&& data,
                                                      const message_options& kwargs) {
    // A message that has come through fifty proxies goes round in a circle. The last line gets its end back here: that
    // was half of the end of data.
    const header top(data += '\n');
    if (top.hops > most_hops) return too_many_hops;
    data.insert(top.end, "X-Peer: " + peer_host(peer) + "\n");
    relay(side::upstream, mailfrom, rcpttos, std::move(data), kwargs,
          [reply = kwargs.defer()](const auto& said) { reply.answer(final_answer(said)); });
    return std::nullopt;
}

// On the transaction that is open, if the other side has accepted just this envelope in it. A subclass that has changed
// the sender or the recipients gets a connection of its own, and so does a message whose client has gone.
void PureProxy::relay(side to, const std::string& mailfrom, const std::vector<std::string>& rcpttos, letter message,
                      const message_options& kwargs, SMTP::handler then) {
    SMTPChannel* client = kwargs.channel();
    ProxyChannel* channel = client ? client->proxy_channel() : nullptr;
    ProxyChannel::transaction* it = channel ? &channel->of(to) : nullptr;
    if (!it || !it->begun || it->mailfrom != mailfrom || it->accepted != rcpttos)
        return deliver(to, mailfrom, rcpttos, std::move(message), kwargs.mail_options, std::move(then));
    it->begun = false;
    if (!it->session) return then({});
    it->session->data(std::move(message), [it, then](const reply& said) {
        it->stale = said.code != 250;
        it->accepted.clear();
        if (said.code != 250 && !is_refusal(said)) it->abandon();
        then(said);
    });
}

void PureProxy::_deliver(const std::string& mailfrom, const std::vector<std::string>& rcpttos, std::string data,
                         SMTP::handler then) {
    deliver(side::upstream, mailfrom, rcpttos, std::move(data), {}, std::move(then));
}

// One reply stands for all the recipients, so one refusal is enough to give up (sendmail's `all`).
void PureProxy::deliver(side to, const std::string& mailfrom, const std::vector<std::string>& rcpttos, letter message,
                        const std::vector<std::string>& mail_options, SMTP::handler then) {
    auto session = new_session(to);
    SMTP& it = *session;
    std::vector<std::string> recipients;
    for (const auto& recipient : rcpttos) recipients.push_back(address_for(to, recipient));
    const auto done = [&it, then = checked(std::move(then))](const reply& said, const auto&...) {
        it.quit();
        then(said);
    };
    deliveries_.insert(&it);
    it.on_close = [this, &it] { deliveries_.erase(&it); };
    it.open(address_of(to), [&it, done, mailfrom, recipients, message, mail_options](const reply& answer) {
        if (answer.code != 250) return done(answer);
        it.sendmail(mailfrom, recipients, message, mail_options, true, done);
    });
    if (it._fileno >= 0) _map->own(std::move(session));
}

// ---------------------------------------------------------------------------------------------------------
// MailmanProxy
// ---------------------------------------------------------------------------------------------------------

namespace {

// What an address for Mailman 3 consists of: NAME-command+tag@domain. A dash may belong to the name, so what follows it
// is a command only if Mailman knows it.
struct list_address {
    std::string listname, command, tag, domain;

    explicit list_address(const std::string& recipient) {
        static const std::set<std::string> commands{"admin", "bounces", "confirm",   "join",       "leave",
                                                    "owner", "request", "subscribe", "unsubscribe"};
        const std::size_t at = std::min(recipient.rfind('@'), recipient.size());
        const std::size_t plus = std::min(recipient.find('+'), at);
        listname = recipient.substr(0, plus);
        tag = recipient.substr(plus, at - plus);
        domain = recipient.substr(std::min(at + 1, recipient.size()));
        const std::size_t dash = listname.rfind('-');
        const std::string last = dash == 0 || dash == listname.npos ? "" : lower(listname.substr(dash + 1));
        if (commands.count(last) == 0) return;
        command = last;
        listname.resize(dash);
    }
};

// The time as RFC 5322 has it, in UTC.
std::string date_now() {
    const std::time_t now = std::time(nullptr);
    std::tm tm{};
    ::gmtime_r(&now, &tm);
    char text[64];
    // strftime() would ask the locale for the two names: it leaves room for them.
    std::strftime(text, sizeof text, "day, %d mon %Y %H:%M:%S +0000", &tm);
    const auto name = [](const char* names, int which) {
        return names + std::size_t{3} * static_cast<unsigned>(which);
    };
    std::memcpy(text, name("SunMonTueWedThuFriSat", tm.tm_wday), 3);
    std::memcpy(text + 8, name("JanFebMarAprMayJunJulAugSepOctNovDec", tm.tm_mon), 3);
    return text;
}

}   // namespace

// A stranger's text becomes part of a path: a slash, or a dot in front, could lead out of the folder, and a NUL would
// cut it short.
bool MailmanProxy::list_exists(const std::string& listname, const std::string& domain) const {
    if (listname.empty() || listname[0] == '.' || domain.empty() || domain[0] == '.') return false;
    if ((listname + domain).find_first_of(std::string_view("/\0", 2)) != listname.npos) return false;
    struct stat status {};
    const auto look = [&](const std::string& path) { return ::stat(path.c_str(), &status) == 0 ? 0 : errno; };
    int err = look(settings.mailman_lists + "/" + listname + "." + domain);
    if (err == 0) return S_ISDIR(status.st_mode);
    // There is no such list only where there is a folder of lists.
    if (err == ENOENT || err == ENAMETOOLONG) err = look(settings.mailman_lists + "/.");
    if (err) throw std::system_error(err, std::generic_category(), settings.mailman_lists);
    return false;
}

void MailmanProxy::check_settings() const {
    PureProxy::check_settings();
    check_next(*this, settings.mailman_lmtp);
    list_exists("lists", "invalid");   // throws when the folder can't be looked into
}

// Mailman's lists are in lower case, and so are their folders.
PureProxy::side MailmanProxy::route(const std::string& recipient) const {
    const list_address parts(lower(recipient));
    return list_exists(parts.listname, parts.domain) ? side::lists : side::upstream;
}

// Mailman 3 takes what goes to -admin for bounces: its administrators are -owner.
std::string MailmanProxy::address_for(side to, const std::string& recipient) const {
    const list_address parts(recipient);
    if (to != side::lists || parts.command != "admin") return recipient;
    return parts.listname + "-owner" + parts.tag + "@" + parts.domain;
}

// Public and virtual: a subclass may hand the message to Mailman in another way.
void MailmanProxy::enqueue(const std::string& mailfrom, const std::vector<std::string>& recipients, std::string message,
                           const message_options& kwargs, SMTP::handler then) {
    if (recipients.empty()) return then({554, "Error: no recipients"});
    enqueue_next(mailfrom, recipients, std::move(message), kwargs, std::move(then));
}

// Mailman gives one reply where RFC 2033 wants one for each recipient. So each gets a transaction of its own. The first
// no ends it, and the client sends to all of them again.
void MailmanProxy::enqueue_next(const std::string& mailfrom, std::vector<std::string> recipients, letter message,
                                const message_options& kwargs, SMTP::handler then) {
    const std::string first = recipients.front();
    recipients.erase(recipients.begin());
    relay(side::lists, mailfrom, {first}, message, kwargs,
          [this, mailfrom, recipients, message, kwargs, then](const reply& said) {
              if (said.code != 250 || recipients.empty()) return then(said);
              enqueue_next(mailfrom, recipients, message, kwargs, then);
          });
}

// The message is one string throughout: upstream's first, then that of the lists. So there is one copy of it in memory,
// and the lines that Mailman needs are put in when upstream has had it. `then` takes upstream's reply; when there is no
// recipient for upstream, it is called as if upstream had said yes.
std::optional<std::string> MailmanProxy::process_message(const address&, const std::string& mailfrom,
                                                         const std::vector<std::string>& rcpttos, std::string&& data,
                                                         const message_options& kwargs) {
    std::vector<std::string> listrcpts, rest;
    for (const auto& recipient : rcpttos) (route(recipient) == side::lists ? listrcpts : rest).push_back(recipient);
    const header top(data += '\n');
    if (top.hops > most_hops) return too_many_hops;
    const std::string added =
        (top.from ? "" : "From: " + mailfrom + "\n") + (top.date ? "" : "Date: " + date_now() + "\n");
    const letter message(std::move(data));
    const SMTP::handler then = [this, mailfrom, listrcpts, message, top, added, kwargs,
                                reply = kwargs.defer()](const auto& said) {
        const SMTP::handler finish = [reply](const auto& last) { reply.answer(final_answer(last)); };
        if (said.code != 250 || listrcpts.empty()) return finish(said);
        message.text->insert(top.end, added);
        enqueue(mailfrom, listrcpts, std::move(*message.text), kwargs, finish);
    };
    if (rest.empty())
        then({250, ""});
    else
        relay(side::upstream, mailfrom, rest, message, kwargs, then);
    return std::nullopt;
}

// ---------------------------------------------------------------------------------------------------------
// The command line's classes
// ---------------------------------------------------------------------------------------------------------

namespace {

template <typename Server>
std::unique_ptr<SMTPServer> make_server(const address& localaddr, const address& remoteaddr, const options& with) {
    return std::make_unique<Server>(localaddr, remoteaddr, with);
}

}   // namespace

// A static inside a function, since a program's server_class objects are static too and may be made first.
std::map<std::string, server_factory>& server_class::all() {
    static std::map<std::string, server_factory> classes{{"SMTPServer", make_server<SMTPServer>},
                                                         {"DebuggingServer", make_server<DebuggingServer>},
                                                         {"PureProxy", make_server<PureProxy>},
                                                         {"MailmanProxy", make_server<MailmanProxy>}};
    return classes;
}

// ---------------------------------------------------------------------------------------------------------
// Replies that come later: not in smtpd.py
// ---------------------------------------------------------------------------------------------------------

// A reply that is owed is shared by the channel, while a hook runs, and by the tokens that defer() has given. It has
// one of four lives:
//
//     the hook returns                   never deferred: what the hook returns is the reply
//     a token answers in the hook        kept in `status` until the hook returns, which is then ignored
//     a token answers later              the channel is paused until then; settle() answers, and it goes on
//     all tokens go, none has answered   ~owed answers: 451, and the channel goes on
//
// In each of them settle() takes the channel out, so that only the first one answers. When the client has gone, its
// channel has set `channel` to null, and answer() does nothing.

// A channel waits for one reply: the last that was asked for.
deferred_reply::owed::owed(SMTPChannel* who) : channel(who) {
    if (owed* former = std::exchange(channel->owed_, this)) former->channel = nullptr;
}

// Gives the client the reply; none is 451. Does nothing when the client has a reply, or has gone.
void deferred_reply::owed::settle(std::optional<std::string_view> reply) {
    SMTPChannel* const waiting = std::exchange(channel, nullptr);
    if (!waiting) return;
    waiting->owed_ = nullptr;
    guarded(*waiting, [&] {
        if (!reply) return waiting->answer_lost();
        waiting->answer(reply->empty() ? "250 OK" : *reply);
    });
}

void deferred_reply::owed::guarded(SMTPChannel& waiting, const std::function<void()>& answer) noexcept {
    if (!succeeds(answer)) succeeds([&] { waiting.close(); });   // it leaves the map in any case
}

// Inside the hook the first answer() is kept; a later one finds it there. See "Replies that come later".
void deferred_reply::answer(std::string_view status) const {
    if (!owed_ || !owed_->channel || owed_->status) return;
    if (owed_->in_hook)
        owed_->status = status;
    else
        owed_->settle(status);
}

SMTPChannel* message_options::channel() const {
    const auto owed = owed_.lock();
    return owed ? owed->channel : nullptr;
}

// The token of the reply that handle_message() holds. When none holds that any more, the token is for no client.
deferred_reply message_options::defer() const {
    auto owed = owed_.lock();
    if (owed) owed->deferred = true;
    return deferred_reply(std::move(owed));
}

// ---------------------------------------------------------------------------------------------------------
// What smtpd.py imports: smtplib
// ---------------------------------------------------------------------------------------------------------

namespace {

bool is_line_end(char c) { return c == '\r' || c == '\n'; }

// The bytes before the first CR or LF. No search goes much further than what it finds, whatever the text is: a body of
// bare CR has a line in each byte. A call costs more than a few bytes do, so the first ones are looked at one by one.
std::size_t line_length(std::string_view text) {
    std::size_t length = 0;
    while (length < 4 && length < text.size() && !is_line_end(text[length])) ++length;
    if (length < 4) return length;
    for (std::size_t window = 64; length < text.size(); window *= 2) {
        const std::string_view part = text.substr(length, window);
        const std::size_t found = std::min(part.find('\n'), part.find('\r'));
        length += std::min(found, part.size());
        if (found != part.npos) break;
    }
    return length;
}

}   // namespace

std::size_t letter::size() const {
    std::size_t size = text->size();
    char last = 0;
    for (const char c : *text) size += (c == '\n') != (std::exchange(last, c) == '\r');   // one of the two is missing
    return size + (last == '\r');
}

namespace {

// A message as it is sent after 354, its last dot included, in pieces of 64 KiB. Every line end becomes CR LF. So a
// byte may become two, and the end takes five: that much room is asked for. The producer shares the text that left_ is
// a view of.
class message_producer : public asynchat::producer {
  public:
    explicit message_producer(letter message) : message_(std::move(message)), left_(*message_.text) {}

    std::string more() override {
        if (done_) return "";
        const std::size_t size = std::min<std::size_t>(2 * left_.size() + 5, 65536);
        const std::unique_ptr<char[]> piece(new char[size]);   // not filled first, as a string would be
        char* out = piece.get();
        const char* const end = out + size;
        while (!left_.empty() && end - out > 2) {
            if (is_line_end(left_[0])) {
                *out++ = '\r', *out++ = '\n';
                left_.remove_prefix(is_crlf(left_) ? 2 : 1);
                in_line_ = false;
                continue;
            }
            if (!in_line_ && left_[0] == '.') *out++ = '.';
            const std::size_t room = std::min(left_.size(), static_cast<std::size_t>(end - out));
            std::size_t length = 0;
            while (length < room && length < 8 && !is_line_end(left_[length])) *out++ = left_[length++];
            if (length == 8) {   // a longer line is worth a search
                const std::size_t rest = line_length(left_.substr(8, room - 8));
                out = std::copy_n(left_.data() + 8, rest, out);
                length += rest;
            }
            left_.remove_prefix(length);
            in_line_ = true;
        }
        done_ = left_.empty() && end - out >= 5;
        if (done_ && in_line_) out = std::copy_n("\r\n", 2, out);
        if (done_) out = std::copy_n(".\r\n", 3, out);
        return {piece.get(), out};
    }

  private:
    const letter message_;
    std::string_view left_;   // what is left of it
    bool in_line_ = false;    // its first byte is not the first one of a line
    bool done_ = false;
};

// When that time has passed from now on; 0 is never.
asyncore::clock::time_point after(std::chrono::milliseconds time) {
    return ends(time) ? asyncore::clock::now() + time : asyncore::clock::time_point::max();
}

void no_delay(asyncore::socket_type& socket) {
    succeeds([&] { socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1); });   // it may be no TCP socket
}

// A line end inside a command would begin another one: an address must not smuggle in a command.
void check_command(const std::string& cmd) {
    if (cmd.find_first_of(std::string_view("\r\n\0", 3)) != cmd.npos)
        throw std::invalid_argument("command and arguments contain prohibited newline characters");
}

// Picks the options of a client's MAIL that the next server offers to take, its SIZE among them or not; and SMTPUTF8
// when an address needs it (Python forgets that). False: the server lacks that.
bool pick_options(const SMTP& session, const std::vector<std::string>& mail_options, bool size, bool utf8,
                  std::vector<std::string>& with) {
    for (const auto& option : mail_options) {
        const std::string name = option.substr(0, option.find('='));
        if (name == "SMTPUTF8")
            utf8 = true;
        else if (session.has_extn(name == "BODY" ? "8BITMIME" : name) && (size || name != "SIZE"))
            with.push_back(option);
    }
    if (utf8) with.emplace_back("SMTPUTF8");
    return !utf8 || session.has_extn("SMTPUTF8");
}

std::string in_brackets(const std::string& addr) { return addr == "<>" ? addr : "<" + addr + ">"; }

// Of several replies to one message the one with the highest value decides. A temporary no does, so that the message is
// sent again and no recipient is lost; some may get it twice.
int severity(const reply& answer) {
    if (answer.code == 250) return 0;
    return answer.code >= 500 ? 1 : 2;
}

}   // namespace

// The digits stand in front of each line: with a dash, but in front of the last. A code below 0 is no reply, and the
// text is for people.
std::string reply::line() const {
    if (code < 0) return text;
    const std::string digits = std::to_string(code);
    std::string result;
    for (std::string_view rest = text;;) {
        const std::size_t end = rest.find('\n');
        result.append(digits).append(end != rest.npos ? "-" : rest.empty() ? "" : " ").append(rest.substr(0, end));
        if (end == rest.npos) return result;
        result += "\r\n";
        rest.remove_prefix(end + 1);
    }
}

// A line ends at LF: found_terminator() takes a CR away, and a server that forgets it is understood.
SMTP::SMTP(asyncore::map_type* map, const timeouts& wait) : async_chat(nullptr, map), wait_(wait) {
    set_terminator("\n");
    why_.reserve(200);   // so that an error can be kept when it is one of memory
}

// The handler is dropped unheard: what it refers to may have gone first. on_close is called, so that those who hold a
// pointer can drop it.
SMTP::~SMTP() {
    const handler dropped = std::exchange(then_, nullptr);
    succeeds([this] { say_closed(); });
}

void SMTP::connect(const address& server, handler then) {
    expect(std::move(then), wait_.connect);
    // A session may connect again: nothing is left of a connection before.
    discard_buffers();
    line_.clear();
    answer_ = {};
    quitting_ = cut_off_ = false;
    next_ = awaited::answer;
    if (server.none()) return fail("there is no server to connect to");
    address to = server;
    if (to.port == 0 && to.family != AF_UNIX) to.port = 25;
    try {
        candidates_ = asyncore::getaddrinfo(to);
    } catch (const std::system_error& error) {
        return fail(error.what());
    }
    std::reverse(candidates_.begin(), candidates_.end());   // they are taken from the back
    attempt();
}

// Tries the next address. A connection that is under way comes back here when it fails: by handle_error(),
// handle_close() or handle_timeout(). The reason that is told in the end is the last one's.
void SMTP::attempt() {
    while (!candidates_.empty()) {
        const address next = std::move(candidates_.back());
        candidates_.pop_back();
        try {
            due_ = after(wait_.connect);
            create_socket(next.family);
            return async_chat::connect(next);
        } catch (const std::exception& error) {
            why_ = error.what();
        }
    }
    fail(why_);
}

void SMTP::handle_connect() {
    // A port of this host without a listener may have been given to this very connection, which then talks to itself.
    const address own = socket->getsockname();
    if (own.family != AF_UNIX && own.repr() == socket->getpeername().repr())
        throw std::system_error(ECONNREFUSED, std::generic_category(), "connect");
    no_delay(*socket);   // the last piece of a message shall not wait until the one before is acknowledged
    candidates_.clear();
    due_ = after(wait_.greeting);
    next_ = awaited::greeting;
}

void SMTP::open(const address& server, handler then) {
    connect(server, [this, then = checked(std::move(then))](const reply& greeting) {
        greeting.code == 220 ? ehlo_or_helo_if_needed(then) : then(greeting);
    });
}

// One handler at a time, since replies carry no number: the next one belongs to the command that was sent last.
void SMTP::expect(handler then, std::chrono::milliseconds wait) {
    if (then_) throw std::logic_error("one command at a time");
    then_ = checked(std::move(then));
    due_ = after(wait);
    replies_left_ = 1;
    worst_ = {};
}

void SMTP::docmd(const std::string& cmd, handler then) {
    check_command(cmd);
    if (!connected) return checked(then)({-1, "not connected"});
    stage = cmd.substr(0, cmd.find(' '));
    expect(std::move(then), wait_.command);
    async_chat::push(cmd + "\r\n");
}

// The first line of the reply greets, and each other one is an extension: a name, and its parameters behind a space or,
// in old servers, `=`.
void SMTP::ehlo(handler then) {
    docmd(ehlo_msg() + " " + own_name(), [this, then = checked(std::move(then))](const reply& answer) {
        does_esmtp = answer.code == 250;
        esmtp_features.clear();
        std::size_t end = answer.text.find('\n');
        while (does_esmtp && end != std::string::npos) {
            const std::size_t start = end + 1;
            end = answer.text.find('\n', start);
            const std::string_view line = std::string_view(answer.text).substr(start, end - start);
            const std::size_t space = std::min(line.find_first_of(" ="), line.size());
            esmtp_features[upper(line.substr(0, space))] = strip(line.substr(std::min(space + 1, line.size())));
        }
        then(answer);
    });
}

// LMTP has no HELO to fall back on.
void SMTP::ehlo_or_helo_if_needed(handler then) {
    ehlo([this, then = checked(std::move(then))](const reply& answer) {
        if (answer.code == 250 || !connected || ehlo_msg() != "EHLO") return then(answer);
        helo(then);
    });
}

// The name to greet with; an address literal when there is no better one.
std::string SMTP::own_name() const {
    if (!local_hostname.empty() || !connected) return local_hostname;
    const address own = socket->getsockname();
    if (own.family == AF_UNIX) return "localhost";
    return (own.family == AF_INET6 ? "[IPv6:" : "[") + own.host + "]";
}

// A new transaction: data_replies() counts its recipients from none.
void SMTP::mail(const std::string& sender, const std::vector<std::string>& with, handler then) {
    std::string cmd = "MAIL FROM:" + in_brackets(sender);
    for (const auto& option : with) cmd += " " + option;
    accepted_ = 0;
    docmd(cmd, std::move(then));
}

void SMTP::rcpt(const std::string& recipient, handler then) {
    docmd("RCPT TO:" + in_brackets(recipient), [this, then = checked(std::move(then))](const reply& answer) {
        if (answer.code == 250 || answer.code == 251) ++accepted_;
        then(answer);
    });
}

// DATA is a command like another until it is sent; then 354 is awaited, and has its own time.
void SMTP::data(letter msg, handler then) {
    docmd("DATA", std::move(then));
    if (!connected) return;
    message_ = std::make_unique<message_producer>(std::move(msg));
    next_ = awaited::go_ahead;
    due_ = after(wait_.data_initiation);
}

// 354 has come. The producer gives the message a piece at a time, as the socket takes it. A server by SMTP sends one
// reply to it, by LMTP one for each recipient that it has accepted.
void SMTP::send_message() {
    stage = "message";
    next_ = awaited::end;
    replies_left_ = std::max<std::size_t>(data_replies(accepted_), 1);
    push_with_producer(std::move(message_));
    message_goes_on();
}

// The clock is set anew with each piece that goes, and once more for the reply when all have gone.
void SMTP::message_goes_on() {
    if (next_ == awaited::end) due_ = after(producer_fifo.empty() ? wait_.data_termination : wait_.data_block);
}

// QUIT in the middle of a message would be text of it. So the connection is closed there, and a message without its
// last dot is none. A command that is under way gets its reply first: report() comes back here.
void SMTP::quit() {
    if (!connected || stopped() || next_ == awaited::go_ahead || !producer_fifo.empty()) return close();
    quitting_ = true;
    due_ = std::min(due_, after(wait_.quit));   // first: if QUIT can't even be said, the session still ends
    if (!then_) async_chat::push("QUIT\r\n");
}

// The reply under way is still awaited, or the next one would be taken for it: its handler does nothing.
void SMTP::forget() {
    on_close = nullptr;
    if (then_) then_ = [](const reply&) {};
}

void SMTP::abandon() noexcept {
    forget();
    succeeds([this] { quit(); });   // if it can't be said, the session ends when it is due
}

// What sendmail() keeps between one command and the next. The handlers share it, so it goes with the last of them.
struct SMTP::mailing {
    std::vector<std::string> to_addrs;
    letter message;
    bool all;
    std::function<void(const reply&, const refused&)> then;
    refused refused_so_far{};
    reply last_refusal{554, "Error: no recipients"};
    std::size_t next = 0;
};

void SMTP::sendmail(const std::string& from_addr, const std::vector<std::string>& to_addrs, letter msg,
                    const std::vector<std::string>& mail_options, bool all,
                    std::function<void(const reply&, const refused&)> then) {
    std::vector<std::string> with;
    const bool utf8 = !is_ascii(from_addr) || !std::all_of(to_addrs.begin(), to_addrs.end(), is_ascii);
    const auto it = std::make_shared<mailing>(mailing{to_addrs, std::move(msg), all, checked(std::move(then))});
    if (connected && !pick_options(*this, mail_options, false, utf8, with)) return it->then(no_SMTPUTF8, {});
    if (has_extn("SIZE")) with.push_back("SIZE=" + std::to_string(it->message.size()));
    mail(from_addr, with, [this, it](const reply& answer) {
        if (answer.code != 250) return it->then(answer, {});
        send_recipients(it);
    });
}

// The next recipient; or the message, when there is none left and one at least was accepted. Each reply calls this
// again from the loop: a thousand recipients take no deep stack.
void SMTP::send_recipients(const std::shared_ptr<mailing>& it) {
    const auto done = [it](const reply& answer) { it->then(answer, it->refused_so_far); };
    const bool all_said = it->next == it->to_addrs.size();
    if (all_said && accepted_ == 0) return done(it->last_refusal);
    if (all_said) return data(std::move(it->message), done);
    const std::string& to = it->to_addrs[it->next++];
    rcpt(to, [this, it, &to, done](const reply& answer) {
        const bool yes = answer.code == 250 || answer.code == 251;
        if (!yes) it->refused_so_far[to] = it->last_refusal = answer;
        if (!yes && (it->all || !connected)) return done(answer);
        send_recipients(it);
    });
}

void SMTP::collect_incoming_data(std::string_view data) {
    if (line_.size() + data.size() > maxline) return fail("the answer is too long");
    line_ += data;
}

// One line of a reply. It belongs to the lines before if those had a dash behind the code; then the code must be the
// same. Control characters become spaces: the text is passed on to clients, and printed.
void SMTP::found_terminator() {
    std::string line = std::exchange(line_, {});
    line.erase(line.find_last_not_of("\r \t") + 1);
    const bool more = line.size() > 3 && line[3] == '-';
    if (more) line[3] = ' ';
    const int code = is_reply(line.substr(0, 4)) ? std::stoi(line) : -1;
    if (code < 0 || (answer_.code >= 0 && answer_.code != code)) return fail("the answer makes no sense");
    for (char& c : line)
        if (is_control(c) && c != '\t') c = ' ';
    if (answer_.code >= 0) answer_.text += '\n';
    answer_.code = code;
    if (line.size() > 4) answer_.text.append(line, 4, line.npos);
    if (answer_.text.size() > maxreply) return fail("the answer is too long");
    if (!more) report(std::exchange(answer_, {}));
}

// A whole reply has come. What it means depends on what is awaited:
//
//     next_       set by                  a yes           then comes
//     greeting    handle_connect          220             answer (open() says EHLO)
//     answer      the end of a command    2yz, 3yz        answer
//     go_ahead    data()                  354             end: the message is sent at once, none is told yet
//     end         send_message            2yz, is 250     answer
//
// 4yz and 5yz are a no in each of them, and go to the handler as they are. Any other code makes no sense, and so does a
// yes to what has not been sent whole: the session fails. The session closes behind 421, behind a no that came before
// the message was sent whole, and when there is more input than replies that are awaited. LMTP's `end` takes a reply
// for each recipient, and the worst of them goes to the handler. It is called when all is in order, because it may
// send the next command, or end the session.
void SMTP::report(reply answer) {
    if (!then_) return quitting_ ? close() : fail("an answer came without a command");
    const bool unfinished = cut_off_ || !producer_fifo.empty();   // the command, or the message, has not been sent
    const bool surplus = !ac_in_buffer().empty();
    // Python: 250 alone. Any other yes would then be a reason to send the message again.
    if (next_ == awaited::end && answer.code / 100 == 2) answer.code = 250;
    const bool yes = next_ == awaited::answer || answer.code == static_cast<int>(next_);
    if (answer.code < 400 && (unfinished || !yes)) return fail("the answer makes no sense");
    if (answer.code == 354 && next_ == awaited::go_ahead && !surplus) return send_message();
    if (severity(answer) >= severity(worst_) || worst_.code < 0) worst_ = answer;
    const bool over = answer.code == 421 || unfinished;
    if (--replies_left_ > 0 && !over) return;
    // More replies than commands. The one to a message counts all the same: the server has taken it.
    if (surplus && next_ != awaited::end && !over) return fail("there are more answers than commands");
    next_ = awaited::answer;
    message_ = nullptr;
    due_ = asyncore::clock::time_point::max();
    const handler then = std::exchange(then_, nullptr);
    const reply decisive = worst_;
    const bool leaving = quitting_;
    if (over || surplus) close();
    then(decisive);
    if (leaving && connected) quit();
}

void SMTP::fail(const std::string& why) {
    why_ = why;
    close();
}

// A descriptor that can't be closed has gone too, and the handler that waits has to know. say_closed() is last: what it
// calls finds the session closed.
void SMTP::close() {
    succeeds([this] { async_chat::close(); });
    producer_fifo.clear();
    say_closed();
}

// on_close, then the handler: each is called, though the other one throws. They are taken out first, so that neither is
// called twice.
void SMTP::say_closed() {
    const auto closed = std::exchange(on_close, nullptr);
    const auto then = std::exchange(then_, nullptr);
    for (const bool first : {true, false}) {
        try {
            if (first && closed) closed();
            if (!first && then) then({-1, why_});
        } catch (const asyncore::ExitNow&) {
            throw;
        } catch (...) {
            log_exception("uncaptured C++ exception at the end of");
        }
    }
}

void SMTP::handle_write() {
    async_chat::handle_write();
    message_goes_on();
}

// The end of input has three meanings: this address refuses, the server has broken off the message, or it has gone.
void SMTP::handle_close() {
    if (connecting) return attempt();
    if (next_ == awaited::end && !producer_fifo.empty() && !std::exchange(cut_off_, true)) {
        // It takes no more of the message, and may have said why: that is read before the session fails.
        producer_fifo.clear();
        handle_read();
        if (!connected) return;
    }
    fail("the connection was closed");
}

// An error of the system is the other side's, and the handler is told of it. Anything else is a mistake of this
// program, which is logged too.
void SMTP::handle_error() {
    try {
        throw;
    } catch (const std::system_error& error) {
        why_ = error.what();
        if (connecting) return attempt();
    } catch (...) {
        log_exception("uncaptured C++ exception, closing channel");
    }
    close();
}

// The reply that is awaited, and the bound of the proxy that the session works for.
asyncore::clock::time_point SMTP::deadline() {
    return std::min({async_chat::deadline(), due_, stop_by_ ? *stop_by_ : asyncore::clock::time_point::max()});
}

void SMTP::handle_timeout() {
    if (stopped()) return fail("the server is shutting down");
    if (due_ > asyncore::clock::now()) return async_chat::handle_timeout();
    why_ = "no answer in time";
    connecting ? attempt() : close();
}

// A map of its own: the caller's objects are left alone, and the loop is over when the session is.
SMTP::refused sendmail(const address& server, const std::string& from_addr, const std::vector<std::string>& to_addrs,
                       std::string msg, const timeouts& wait, const sendmail_options& with) {
    check_command(from_addr);
    for (const auto& addr : to_addrs) check_command(addr);
    asyncore::map_type map;
    SMTP session(&map, wait);
    session.local_hostname = with.local_hostname;
    reply result;
    SMTP::refused refused;
    const auto done = [&](const reply& answer, const SMTP::refused& some) {
        result = answer;
        refused = some;
        session.quit();
    };
    session.open(server, [&](const reply& answer) {
        if (answer.code != 250) return done(answer, {});
        session.sendmail(from_addr, to_addrs, std::move(msg), with.mail_options, false, done);
    });
    const auto end = after(with.total);
    while (!map.empty()) {
        const std::chrono::duration<double> left = end - asyncore::clock::now();
        if (left.count() <= 0) session.close();
        asyncore::poll(std::clamp(left.count(), 0.0, 30.0), &map);
    }
    if (result.code < 0 && result.text.empty()) result.text = "no answer in time";
    if (result.code != 250) throw SMTPResponseException(result, session.stage, refused);
    return refused;
}

// ---------------------------------------------------------------------------------------------------------
// str: bytes that are mostly UTF-8
// ---------------------------------------------------------------------------------------------------------

namespace {

bool is_ascii(std::string_view text) {
    return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

bool is_control(char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }

std::string upper(std::string_view text) {
    std::string result(text);
    for (char& c : result)
        if (c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
    return result;
}

// The length of the UTF-8 character that the text begins with; 0 when it is not one. Not allowed are what a shorter
// form can say (C0, C1, E0 80, F0 80), surrogates (ED A0), and what is beyond U+10FFFF (F4 90).
std::size_t utf8_length(std::string_view text) {
    const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
    const auto follows = [&](std::size_t i) { return (byte(i) & 0xc0) == 0x80; };
    const unsigned first = byte(0), second = byte(1);
    if (first < 0x80) return text.empty() ? 0 : 1;
    if (first < 0xc2 || first > 0xf4 || !follows(1)) return 0;
    if (first < 0xe0) return 2;
    if ((first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f) || !follows(2)) return 0;
    if (first < 0xf0) return 3;
    if ((first == 0xf0 && second < 0x90) || (first == 0xf4 && second > 0x8f) || !follows(3)) return 0;
    return 4;
}

// The bytes that whole UTF-8 characters take at the front of the text.
std::size_t utf8_prefix(std::string_view text) {
    std::size_t size = 0;
    while (const std::size_t length = utf8_length(text.substr(size))) size += length;
    return size;
}

bool is_utf8(std::string_view text) { return utf8_prefix(text) == text.size(); }

// The length of the white space that the text begins with; or 0. Python: str.isspace()
std::size_t space_length(std::string_view text) {
    const std::size_t length = utf8_length(text);
    if (length == 0) return 0;
    unsigned c = static_cast<unsigned char>(text[0]);   // the character; its first byte loses its marks
    if (length > 1) c &= 0x7fu >> length;
    for (const char byte : text.substr(1, length - 1)) c = c << 6 | (static_cast<unsigned char>(byte) & 0x3f);
    const bool space = c == ' ' || (c >= '\t' && c <= '\r') || (c >= 0x1c && c <= 0x1f) || c == 0x85 || c == 0xa0 ||
                       c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
                       c == 0x205f || c == 0x3000;
    return space ? length : 0;
}

std::string_view lstrip(std::string_view text) {
    while (const std::size_t length = space_length(text)) text.remove_prefix(length);
    return text;
}

// Without white space at both ends. From the end back, a character is as long as the bytes that continue one. Python:
// str.strip()
std::string_view strip(std::string_view text) {
    text = lstrip(text);
    while (!text.empty()) {
        std::size_t last = text.size() - 1;   // where the last character begins
        while (last > 0 && (text[last] & 0xc0) == 0x80) --last;
        if (last + space_length(text.substr(last)) != text.size()) break;
        text = text.substr(0, last);
    }
    return text;
}

// Python: "".join(text.split())
std::string without_space(std::string_view text) {
    std::string result;
    while (!text.empty()) {
        const std::size_t space = space_length(text);
        if (space == 0) result += text[0];
        text.remove_prefix(space ? space : 1);
    }
    return result;
}

// The words between blanks and tabs.
std::vector<std::string> split(std::string_view text) {
    std::vector<std::string> words;
    words.reserve((text.size() + 1) / 2);
    const auto blank = [](char c) { return c == ' ' || c == '\t'; };
    for (auto end = text.begin(); end != text.end();) {
        const auto begin = std::find_if_not(end, text.end(), blank);
        end = std::find_if(begin, text.end(), blank);
        if (begin != end) words.emplace_back(begin, end);
    }
    return words;
}

// ['a', 'b']. Python: repr() of a list
std::string list_repr(const std::vector<std::string>& list) {
    std::string text;
    for (const auto& item : list) text += (text.empty() ? "" : ", ") + asyncore::repr(item);
    return "[" + text + "]";
}

// Appends a piece of a message: CR LF becomes LF, and a dot that follows it goes (RFC 5321, 4.5.2). What belongs
// together is always in one piece, because it might have begun the terminator. A CR by itself is kept. The result is no
// longer than the piece, so it is written straight to its place.
void append_unstuffed(std::string& out, std::string_view in) {
    const std::size_t before = out.size();
    out.resize(before + in.size());
    char* to = out.data() + before;
    while (!in.empty()) {
        std::size_t size = 0;   // of the text before a CR; a short one takes no search
        while (size < 8 && size < in.size() && in[size] != '\r') ++size;
        if (size == 8) size = std::min(in.find('\r', 8), in.size());
        to = std::copy_n(in.data(), size, to);
        in.remove_prefix(size);
        if (is_crlf(in)) {
            *to++ = '\n';
            in.remove_prefix(in.substr(2, 1) == "." ? 3 : 2);
        } else if (!in.empty()) {
            *to++ = '\r';
            in.remove_prefix(1);
        }
    }
    out.resize(static_cast<std::size_t>(to - out.data()));
}

// Whether a text that comes from a hook is one reply (RFC 5321, 4.2): three digits, then a space or the end, or a dash
// and another line with the same digits. Nothing else may go out as a hook's reply: a client that gets one line too
// many takes it for the reply to its next command.
bool is_reply(std::string_view text) {
    const std::string_view code = text.substr(0, 3);
    if (code.size() < 3 || code[0] < '2' || code[0] > '5' || code.find_first_not_of("0123456789") != code.npos)
        return false;
    for (;;) {
        const std::size_t end = text.find("\r\n");
        const std::string_view line = text.substr(0, end);
        const char mark = line.size() == 3 ? ' ' : line.substr(0, 3) == code ? line[3] : '?';
        if (mark != (end == text.npos ? ' ' : '-') || line.find_first_of("\r\n") != line.npos) return false;
        if (end == text.npos) return true;
        text.remove_prefix(end + 2);
    }
}

// ---------------------------------------------------------------------------------------------------------
// email: the addresses of MAIL, RCPT and VRFY, after _header_value_parser.py
// ---------------------------------------------------------------------------------------------------------

// Reads an address from the front of `text`, and appends what is to be kept of it to `address`. RFC 2047 words are text
// like any other; Python decodes them, and what they hide gets into the envelope.
//
// The functions are Python's. False is its HeaderParseError: the caller may try another reading. (Its IndexError, after
// which it tries none, needs no value of its own: where it is raised, the other reading fails too.) get_atom() and what
// is below it have then taken nothing but comments and white space.
class address_parser {
  public:
    std::string_view text;   // what has not been read yet
    std::string address;

    explicit address_parser(std::string_view input) : text(input) {}

    // A local part and, behind an @, a domain; an address without one is taken, as in Python. The local part is written
    // anew: in quotes if it has a character that takes them, whether the client wrote it so or not.
    bool get_addr_spec() {
        if (!get_local_part()) return false;
        if (address.find_first_of(DOT_ATOM_ENDS) != address.npos) {
            std::string quoted = "\"";
            for (const char c : address) {
                if (c == '"' || c == '\\') quoted += '\\';
                quoted += c;
            }
            address = quoted + '"';
        }
        if (!next_is('@')) return true;
        take();
        const std::size_t size = address.size();
        if (!get_domain()) return false;
        const std::string domain = without_space(std::string_view(address).substr(size));
        // Python: sent on as it is, though the next server reads `[>]` otherwise than `[\>]`. Here it is malformed.
        if (domain.find_first_of("<>[]\\", 1) < domain.size() - 1) return false;
        address.replace(size, address.npos, domain);
        return true;
    }

    // <address>, where the > may be missing, as in Python. What is no address may be a route in front of one.
    bool get_angle_addr() {
        get_cfws();
        if (!skip('<')) return false;
        if (skip('>')) {
            address = "<>";
            return true;
        }
        const std::string_view start = text;
        if (!get_addr_spec()) {
            text = start;
            const bool route = get_obs_route();
            address.clear();   // of the first reading, and of the route
            if (!route || !get_addr_spec()) return false;
        }
        if (address.empty() || address[0] == '@') address.insert(0, "\"\"");
        skip('>');
        get_cfws();
        return true;
    }

  private:
    static constexpr std::string_view WSP = " \t";
    static constexpr std::string_view CFWS_LEADER = " \t(";
    static constexpr std::string_view ATOM_ENDS = "()<>@,:;.\\\"[] \t";
    static constexpr std::string_view DOT_ATOM_ENDS = "()<>@,:;\\\"[] \t";
    static constexpr std::string_view PHRASE_ENDS = ")<>@,:;[]";   // Python's has a backslash, and excepts it each time

    static bool in(char c, std::string_view set) { return set.find(c) != set.npos; }
    bool next_is(char c) const { return !text.empty() && text[0] == c; }
    bool next_in(std::string_view set) const { return !text.empty() && in(text[0], set); }
    bool ends_phrase() const { return text.empty() || next_in(PHRASE_ENDS); }
    bool skip(char c) {
        const bool found = next_is(c);
        text.remove_prefix(found);
        return found;
    }
    void take(std::size_t size = 1) {
        address.append(text, 0, size);
        text.remove_prefix(size);
    }

    // Text with its quoted pairs resolved, up to white space or one of `ends`. A backslash does not protect white
    // space.
    void get_ptext(std::string_view ends) {
        for (bool escape = false; !text.empty() && !in(text[0], WSP); text.remove_prefix(1)) {
            if (!escape && in(text[0], ends)) return;
            escape = text[0] == '\\' && !escape;
            if (!escape) address += text[0];
        }
    }

    void get_fws() { text = lstrip(text); }

    // Python's atoms have no list of what they may have, but one of what ends them: any other byte will do.
    bool get_atext() {
        const std::size_t size = std::min(text.find_first_of(ATOM_ENDS), text.size());
        take(size);
        return size > 0;
    }

    // The quotes are left out here: get_addr_spec() puts them back where the local part needs them.
    void get_bare_quoted_string() {
        skip('"');
        while (!text.empty() && text[0] != '"') {
            if (in(text[0], WSP))
                take(text.size() - lstrip(text).size());
            else
                get_ptext("\"");
        }
        skip('"');
    }

    // Comments nest. They are counted and not recursed into: a line of parentheses takes no stack.
    void get_comment() {
        int depth = 0;
        do {
            if (text[0] == '(') ++depth;
            if (text[0] == ')') --depth;
            const bool escapes = text[0] == '\\' && text.size() > 1 && !in(text[1], WSP);
            text.remove_prefix(escapes ? 2 : 1);
        } while (depth > 0 && !text.empty());
    }

    // Comments and folding white space; whether there was any.
    bool get_cfws() {
        const std::size_t before = text.size();
        while (next_in(CFWS_LEADER)) {
            if (text[0] == '(')
                get_comment();
            else
                get_fws();
        }
        return text.size() != before;
    }

    bool get_atom() {
        get_cfws();
        if (!get_atext()) return false;
        get_cfws();
        return true;
    }

    // What is not a dot-atom is left for another reading; white space and comments in front have been taken.
    bool get_dot_atom() {
        get_cfws();
        const std::string_view found = text.substr(0, text.find_first_of(DOT_ATOM_ENDS));
        if (found.empty() || found.front() == '.' || found.back() == '.' || found.find("..") != found.npos)
            return false;
        take(found.size());
        get_cfws();
        return true;
    }

    // An atom or a quoted string, with comments and white space around it.
    bool get_word() {
        get_cfws();
        if (!next_is('"')) return get_atom();
        get_bare_quoted_string();
        get_cfws();
        return true;
    }

    // A dot-atom or a word, which must end where a phrase does. Otherwise it is all read again, more leniently.
    bool get_local_part() {
        const std::string_view start = text;
        get_cfws();
        // Python looks at the first item of nothing when all that is left is a quote.
        if (text.empty() || text == "\"") return false;
        if (!get_dot_atom() && !get_word() && ends_phrase()) return false;
        if (ends_phrase()) return true;
        text = start;
        address.clear();
        get_obs_local_part();
        return true;
    }

    // Words, with or without dots between them. White space counts as one space, but not next to a dot, nor between
    // two backslashes that are out of place.
    void get_obs_local_part() {
        for (char before = '.';;) {
            const bool space = get_cfws();
            if (ends_phrase()) return;
            const char next = next_in(".\\") ? text[0] : 'a';   // a: a word
            if (space && next != '.' && before != '.' && (next == 'a' || before == 'a')) address += ' ';
            if (next != 'a')
                take();
            else if (next_is('"'))
                get_bare_quoted_string();
            else
                get_atext();
            before = next;
        }
    }

    // [ and ], with any text between them but another bracket. get_addr_spec() looks at it more closely.
    bool get_domain_literal() {
        take();   // the bracket
        if (next_in(WSP)) get_fws();
        get_ptext("[]");
        if (next_in(WSP)) get_fws();
        if (!next_is(']')) return false;
        take();
        get_cfws();
        return true;
    }

    // A literal, or atoms with dots between them, which may have white space and comments around them.
    bool get_domain() {
        get_cfws();
        if (next_is('[')) return get_domain_literal();
        if ((!get_dot_atom() && !get_atom()) || next_is('@')) return false;
        while (next_is('.')) {
            take();
            if (!get_atom()) return false;
        }
        return true;
    }

    // @one,@two: in front of an address was the way to it (RFC 822). It is read and left out.
    bool get_obs_route() {
        while (get_cfws() || skip(',')) {}
        if (!skip('@') || !get_domain()) return false;
        while (skip(',')) {
            get_cfws();
            if (skip('@') && !get_domain()) return false;
        }
        return skip(':');
    }
};

// As in smtpd.py, the first character decides between <address> and a bare one.
bool parse_address(std::string_view arg, std::string& address, std::string_view& rest) {
    address_parser parser(arg);
    const bool in_brackets = lstrip(arg).substr(0, 1) == "<";
    if (in_brackets ? !parser.get_angle_addr() : !parser.get_addr_spec()) return false;
    address = std::move(parser.address);
    rest = parser.text;
    return true;
}

}   // namespace

}   // namespace v1
}   // namespace smtpd
