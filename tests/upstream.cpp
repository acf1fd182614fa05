#include "upstream.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>

#include "test.hpp"

namespace support {

namespace {

std::string upper(std::string text) {
    for (char& c : text)
        if (c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
    return text;
}

// The code of the first answer, when it is whole; or -1.
int code_of(std::string_view bytes) {
    const std::string_view code = bytes.substr(0, 3);
    if (code.size() < 3 || code.find_first_not_of("0123456789") != code.npos) return -1;
    for (;;) {
        const std::size_t end = bytes.find('\n');
        if (end == bytes.npos || bytes.substr(0, 3) != code) return -1;
        if (bytes[3] != '-') {
            const bool proper = std::string_view(" \r\n").find(bytes[3]) != std::string_view::npos;
            return proper ? std::stoi(std::string(code)) : -1;
        }
        bytes.remove_prefix(end + 1);
    }
}

void close_with_reset(asyncore::dispatcher& it) {
    const linger at_once{1, 0};
    ::setsockopt(it._fileno, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    it.close();
}

// b@example from RCPT TO:<b@example>
std::string inside_brackets(const std::string& line) {
    const std::size_t from = line.find('<'), to = line.rfind('>');
    return from == line.npos || to == line.npos ? line : line.substr(from + 1, to - from - 1);
}

}   // namespace

act says(const std::string& answer) {
    act it;
    it.bytes = answer + "\r\n";
    it.well_formed = true;
    return it;
}

act sends(const std::string& bytes) {
    act it;
    it.bytes = bytes;
    return it;
}

act says_nothing() {
    act it;
    it.silent = true;
    return it;
}

act hangs_up() {
    act it;
    it.then = act::hang_up;
    return it;
}

act resets() {
    act it;
    it.then = act::reset;
    return it;
}

// ---------------------------------------------------------------------------------------------------------
// One connection
// ---------------------------------------------------------------------------------------------------------

class upstream::session : public asynchat::async_chat {
  public:
    session(upstream& server, std::unique_ptr<asyncore::socket_type> conn, std::size_t number)
        : async_chat(std::move(conn), server._map), server_(&server), number_(number) {
        const int on = 1;
        ::setsockopt(_fileno, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        set_terminator("\r\n");
        server.sessions_.push_back(this);
    }
    ~session() override { leave(); }
    std::string class_name() const override { return "upstream.session"; }

    void greet() { perform("greeting", "", server_->next("", "greeting", "220 upstream ready")); }

    void perform(const std::string& stage, const std::string& line, const act& what) {
        stage_ = stage;
        line_of_stage_ = line;
        now_ = what;
        owed_ = true;
        if (!what.well_formed) spoiled_ = true;
        if (what.held) return server_->held_.push_back(this);
        if (!what.silent) answer();
    }

    // Does what perform() has put off.
    void answer() {
        now_.held = false;
        if (now_.slow && !now_.bytes.empty()) return;   // see handle_timeout()
        if (now_.then == act::reset) return drop(true);
        finish(now_.bytes);
    }

    // Sends the last bytes of an answer.
    void finish(const std::string& bytes) {
        const act::ending then = now_.then;
        answered();
        if (then == act::hang_up) spoiled_ = true;
        if (then == act::hang_up && bytes.empty()) return drop(false);
        push(bytes);
        if (!connected) return;
        if (then == act::hang_up)
            close_when_done(), initiate_send();
        else if (stage_ == "end" && !waiting_.empty())
            end_of_message();
    }

    void drop(bool with_reset) {
        spoiled_ = true;
        with_reset ? close_with_reset(*this) : close();
    }

    void collect_incoming_data(std::string_view data) override { line_ += data; }

    void found_terminator() override {
        const std::string line = std::exchange(line_, {});
        in_message_ ? message_line(line) : command(line);
    }

    asyncore::clock::time_point deadline() override {
        const bool dripping = owed_ && now_.slow && !now_.held && !now_.silent && producer_fifo.empty();
        return dripping ? asyncore::clock::time_point::min() : async_chat::deadline();
    }

    void handle_timeout() override {
        if (!owed_ || !now_.slow) return async_chat::handle_timeout();
        const std::string byte = now_.bytes.substr(dripped_++, 1);
        if (dripped_ == now_.bytes.size()) {
            dripped_ = 0;
            return finish(byte);
        }
        push(byte);
    }

    void handle_close() override {
        if (server_ && !spoiled_ && !owed_ && !quit_ && !in_message_) complain("a connection ends without QUIT");
        close();
    }

    void handle_error() override { handle_close(); }

    void close() override {
        leave();
        async_chat::close();
    }

    void spoil() { spoiled_ = true; }

  private:
    std::vector<std::string>& heard() { return server_->heard[number_]; }

    void complain(const std::string& what) {
        server_->complaints.push_back(what + " (after: " + server_->conversation(number_) + ")");
    }

    void leave() {
        if (!server_) return;
        auto& all = server_->sessions_;
        all.erase(std::remove(all.begin(), all.end(), this), all.end());
        auto& held = server_->held_;
        held.erase(std::remove(held.begin(), held.end(), this), held.end());
        server_ = nullptr;
    }

    void command(const std::string& line) {
        if (owed_ && !spoiled_) complain("a command before the answer to the last one: " + line);
        if (quit_) complain("a command after QUIT: " + line);
        if (!ac_in_buffer().empty()) complain("more than one command at a time: " + line);
        heard().push_back(line);
        const std::string verb = upper(line.substr(0, line.find(' ')));
        std::string usual = "502 5.5.1 what?";
        if (verb == "EHLO" || verb == "LHLO") {
            usual = "250-upstream";
            for (const auto& extension : server_->extensions) usual += "\r\n250-" + extension;
            usual.replace(usual.rfind("250-"), 4, "250 ");
        } else if (verb == "HELO") {
            usual = "250 upstream";
        } else if (verb == "MAIL") {
            if (open_) complain("MAIL inside a transaction");
            usual = "250 2.1.0 sender ok";
        } else if (verb == "RCPT") {
            if (!open_ && !spoiled_) complain("RCPT without MAIL");
            usual = "250 2.1.5 recipient ok";
        } else if (verb == "DATA") {
            if (mail_.rcpttos.empty() && !spoiled_) complain("DATA without recipients");
            usual = "354 go ahead";
        } else if (verb == "RSET") {
            usual = "250 2.0.0 reset";
        } else if (verb == "QUIT") {
            quit_ = true;
            usual = "221 2.0.0 bye";
        }
        act what = server_->next(line, verb, usual);
        if (verb == "QUIT" && what.then == act::stay && what.well_formed) what.then = act::hang_up;
        perform(verb, line, what);
    }

    void message_line(const std::string& line) {
        if (line != ".") {
            if (line.find_first_of("\r\n") != line.npos) complain("a line end in a message is not CR LF");
            mail_.wire += line + "\r\n";
            mail_.data += line.substr(!line.empty() && line[0] == '.' ? 1 : 0) + "\n";
            if (std::exchange(first_line_, false) && (server_->script.count("body") || server_->always.count("body")))
                perform("body", "", server_->next("", "body", ""));
            return;
        }
        if (!ac_in_buffer().empty()) complain("a command right after the message");
        in_message_ = false;
        heard().push_back("(message)");
        mail_.connection = number_;
        server_->messages.push_back(std::exchange(mail_, {}));
        mine_ = server_->messages.size() - 1;
        waiting_ = server_->lmtp ? server_->messages[mine_].rcpttos : std::vector<std::string>(1);
        end_of_message();
    }

    // The next answer to the message.
    void end_of_message() {
        const std::string recipient = waiting_.front();
        waiting_.erase(waiting_.begin());
        perform("end", recipient, server_->next("end " + recipient, "end", "250 2.0.0 message ok"));
    }

    // An answer has been given, or is about to be sent: what follows from it.
    void answered() {
        owed_ = false;
        const int code = code_of(now_.bytes);
        if (stage_ == "MAIL" && code == 250) {
            open_ = true;
            mail_ = {};
            mail_.mailfrom = line_of_stage_;
        } else if (stage_ == "RCPT" && (code == 250 || code == 251)) {
            mail_.rcpttos.push_back(inside_brackets(line_of_stage_));
        } else if (stage_ == "DATA" && now_.bytes.substr(0, 3) == "354") {
            in_message_ = first_line_ = true;
        } else if (stage_ == "RSET" && code == 250) {
            open_ = false;
        } else if (stage_ == "end") {
            open_ = false;
            mail& it = server_->messages[mine_];
            it.told += now_.bytes;
            it.accepted = code / 100 == 2 && (it.told == now_.bytes || it.accepted);
        }
        if (code == 421) spoiled_ = true;
    }

    upstream* server_;
    std::size_t number_;
    std::string line_, stage_, line_of_stage_;
    act now_;
    mail mail_;
    std::vector<std::string> waiting_;   // recipients whose answer to the message is still to come
    std::size_t dripped_ = 0, mine_ = 0;
    bool owed_ = false, open_ = false, in_message_ = false, first_line_ = false, quit_ = false, spoiled_ = false;
};

// ---------------------------------------------------------------------------------------------------------
// The server
// ---------------------------------------------------------------------------------------------------------

upstream::upstream(asyncore::map_type& map, const std::string& host) : dispatcher(nullptr, &map), host_(host) {
    accept_again();
}

upstream::~upstream() { hang_up(); }

void upstream::accept_again() {
    placeholder_.close();
    create_socket();
    set_reuse_addr();
    bind(where());
    listen(SOMAXCONN);
    port_ = socket->getsockname().port;
}

void upstream::refuse() {
    close();
    placeholder_ = asyncore::socket_type(AF_INET, SOCK_STREAM);
    placeholder_.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1);
    placeholder_.bind(where());
}

void upstream::handle_accepted(std::unique_ptr<asyncore::socket_type> conn, const asyncore::address&) {
    auto made = std::make_unique<session>(*this, std::move(conn), heard.size());
    session& it = *made;
    heard.emplace_back();
    _map->own(std::move(made));
    it.greet();
}

act upstream::next(const std::string& line, const std::string& stage, const std::string& usual) {
    for (const auto* key : {&line, &stage}) {
        if (const auto acts = script.find(*key); acts != script.end() && !acts->second.empty()) {
            const act first = acts->second.front();
            acts->second.pop_front();
            return first;
        }
    }
    for (const auto* key : {&line, &stage})
        if (const auto it = always.find(*key); it != always.end()) return it->second;
    return usual.empty() ? sends("") : says(usual);
}

void upstream::release() {
    session* first = held_.front();
    held_.pop_front();
    first->answer();
}

void upstream::hang_up() {
    while (!sessions_.empty()) sessions_.back()->drop(false);
}

void upstream::say_unasked(const std::string& bytes) {
    for (session* it : std::vector<session*>(sessions_)) {
        it->spoil();
        it->push(bytes);
    }
}

std::string upstream::conversation(std::size_t connection) const {
    std::string text;
    for (const auto& line : heard.at(connection)) text += (text.empty() ? "" : " / ") + line;
    return text;
}

std::string upstream::conversations() const {
    std::string text;
    for (std::size_t i = 0; i < heard.size(); ++i)
        text += "\n    connection " + std::to_string(i + 1) + ": " + conversation(i);
    return text;
}

std::size_t upstream::accepted(std::string_view text) const {
    std::size_t count = 0;
    for (const auto& it : messages) count += it.accepted && it.data.find(text) != it.data.npos;
    return count;
}

void upstream::check() const {
    std::string text;
    for (const auto& it : complaints) text += "\n    " + it;
    if (!text.empty()) throw test::failure("upstream complains:" + text);
}

// ---------------------------------------------------------------------------------------------------------
// The client
// ---------------------------------------------------------------------------------------------------------

caller::caller(asyncore::map_type& map, const asyncore::address& server, bool use_poll)
    : dispatcher(nullptr, &map), use_poll_(use_poll) {
    const auto numeric = asyncore::getaddrinfo(server).front();
    create_socket(numeric.family);
    socket->setsockopt(IPPROTO_TCP, TCP_NODELAY, 1);   // what is said in two pieces is not to wait for an ACK
    connect(numeric);
}

caller::caller(smtpd::SMTPServer& server, bool use_poll) : dispatcher(nullptr, server._map), use_poll_(use_poll) {
    int fds[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0) throw std::runtime_error("socketpair");
    set_socket(std::make_unique<asyncore::socket_type>(fds[0]));
    socket->setblocking(false);
    connected = true;
    asyncore::address none;
    none.family = AF_UNIX;
    server.handle_accepted(std::make_unique<asyncore::socket_type>(fds[1]), none);
}

void caller::run_until(const std::function<bool()>& done) { support::run_until(*_map, done, use_poll_); }

void caller::say(std::string_view bytes) {
    unsent_ += bytes;
    if (connected) handle_write();
}

void caller::handle_write() {
    if (!unsent_.empty()) unsent_.erase(0, send(std::string_view(unsent_).substr(0, 65536)));
}

void caller::handle_read() { received += recv(65536); }

void caller::handle_close() {
    eof = true;
    close();
}

void caller::reset() { close_with_reset(*this); }

bool caller::whole_answer(std::size_t& size) const {
    for (size = 0;;) {
        const std::size_t end = received.find("\r\n", size);
        if (end == received.npos) return false;
        const bool more = end > size + 3 && received[size + 3] == '-';
        size = end + 2;
        if (!more) return true;
    }
}

std::string caller::answer() {
    std::size_t size = 0;
    run_until([&] { return whole_answer(size) || eof; });
    if (!whole_answer(size)) return "(closed)";
    const std::string result = received.substr(0, size - 2);
    received.erase(0, size);
    return result;
}

std::string caller::ask(const std::string& line) {
    say(line + "\r\n");
    return answer();
}

void caller::wait_for_close() {
    run_until([this] { return eof; });
}

std::string caller::mail(const std::string& from, const std::vector<std::string>& to, const std::string& message) {
    std::string all = ask("MAIL FROM:" + from);
    if (all.substr(0, 3) != "250") return all;
    bool accepted = false;
    for (const auto& recipient : to) {
        const std::string said = ask("RCPT TO:<" + recipient + ">");
        accepted = accepted || said.substr(0, 3) == "250";
        all += " / " + said;
    }
    if (!accepted) return all;
    const std::string said = ask("DATA");
    if (said.substr(0, 3) != "354") return all + " / " + said;
    say(message + "\r\n.\r\n");
    return all + " / 354 / " + answer();
}

}   // namespace support
