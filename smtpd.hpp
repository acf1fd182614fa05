// smtpd: Python's SMTP server (RFC 5321, with SIZE, 8BITMIME and SMTPUTF8), in C++17.
//
//     struct CustomServer : smtpd::SMTPServer {
//         using SMTPServer::SMTPServer;
//         std::optional<std::string> process_message(const asyncore::address& peer, const std::string& mailfrom,
//                                                    const std::vector<std::string>& rcpttos, std::string&& data,
//                                                    const smtpd::message_options& kwargs) override {
//             inbox.push_back(std::move(data));
//             return std::nullopt;   // 250 OK; or the reply, such as "550 no such user"
//         }
//         std::vector<std::string> inbox;
//     };
//     CustomServer server({"127.0.0.1", 1025}, {});
//     asyncore::loop();
//
// SMTPServer listens and makes an SMTPChannel for each client; the channel holds the conversation and hands
// each message to process_message(). DebuggingServer prints the messages, PureProxy passes them on to another
// server, MailmanProxy gives those for mailing lists to Mailman. Everything runs in the loop of asyncore.hpp,
// whose rules of ownership hold here: channels belong to the map, servers to the code that made them.

#ifndef SMTPD_HPP
#define SMTPD_HPP

#include <functional>
#include <map>
#include <set>

#include "asyncore.hpp"

namespace smtpd {
inline namespace v1 {

class SMTPChannel;
class SMTPServer;
class PureProxy;
class ProxyChannel;

// The banner's text; the number is this project's. smtpd.py: __version__
inline constexpr std::string_view version = "C++ SMTP proxy version 1.0.0";

// In bytes. smtpd.py: DATA_SIZE_DEFAULT
inline constexpr std::size_t DATA_SIZE_DEFAULT = 33554432;

// The debug log (-d). It discards everything until you give it a buffer: DEBUGSTREAM.rdbuf(std::cerr.rdbuf()).
std::ostream& default_debugstream();
// smtpd.py: DEBUGSTREAM
inline std::ostream& DEBUGSTREAM = default_debugstream();

// How long a client waits for a server: RFC 5321, 4.5.3.2, and what it leaves open.
struct timeouts {
    std::chrono::milliseconds connect{30000};   // for each address that a name stands for
    std::chrono::milliseconds greeting{300000};
    std::chrono::milliseconds command{300000};            // EHLO, MAIL, RCPT, RSET
    std::chrono::milliseconds data_initiation{120000};    // the reply to DATA
    std::chrono::milliseconds data_block{180000};         // any progress while the message is sent
    std::chrono::milliseconds data_termination{600000};   // the reply to the message
    std::chrono::milliseconds quit{5000};

    static timeouts all(std::chrono::milliseconds time) { return {time, time, time, time, time, time, time}; }
};

// What a server is made with: set what differs, as in `smtpd::options with; with.fqdn = "mx.example";`. A timeout or a
// limit of 0 means none.
struct options {
    // Bytes of a message as they come over the wire, announced by SIZE. A larger message gets 552 at its end, and what
    // is over the limit is not stored. A client may make the server hold that much memory until its message is handled.
    std::size_t data_size_limit = DATA_SIZE_DEFAULT;

    // The map that the server and its channels register with; it must outlive them. Null: asyncore::socket_map.
    asyncore::map_type* map = nullptr;

    // Offer SMTPUTF8 (RFC 6531): addresses and headers may be UTF-8. Not together with decode_data.
    bool enable_SMTPUTF8 = false;

    // Messages must be UTF-8, or get 554; 8BITMIME is not offered. process_message() gets the same bytes either way.
    bool decode_data = false;

    // What follows is not in Python.

    // The name in the banner and in the reply to HELO and EHLO. "": asyncore::getfqdn(), which may block once.
    std::string fqdn{};

    // A client that does nothing for so long gets 421 and is closed (RFC 5321, 4.5.3.2.7). A command counts from its
    // first byte, a message from its last one, replies when 4 KiB or all of them have been taken. A longer time keeps
    // the memory and the descriptor of dead clients longer; a shorter one cuts people who type.
    std::chrono::milliseconds idle_timeout{300000};

    // A message that brings less than 64 KiB in this time gets 421, however steadily it drips. An hour for that is
    // 18 bytes a second: no honest client is so slow.
    std::chrono::milliseconds data_timeout{3600000};

    // Clients at a time; the next one gets 421. It bounds what clients can make the server hold in all: that many times
    // data_size_limit and reply_queue_limit, at worst.
    std::size_t connection_limit = 0;

    // Recipients of one message; the next one gets 452, and the client sends it another time (RFC 5321, 4.5.3.1.10).
    // Each costs the length of its address.
    std::size_t rcpt_limit = 1000;

    // Bytes of replies that a client has not taken yet. Past that, nothing more is read from it. A larger value only
    // lets a client that never reads hold more memory.
    std::size_t reply_queue_limit = 1 << 20;

    // PureProxy, MailmanProxy: how long they wait for the servers that they send to. Their clients wait as long.
    timeouts upstream{};

    // MailmanProxy: the folder `lists` of Mailman 3, with a folder NAME.DOMAIN for each list; and where Mailman takes
    // messages by LMTP.
    std::string mailman_lists = "/var/lib/mailman3/lists";
    asyncore::address mailman_lmtp{"127.0.0.1", 8024};
};

// A reply that is given later: a token for it. Copies are the same token, and the first answer() counts. When the last
// copy goes and there was none, the client gets 451. It belongs to the loop's thread; asyncore::trigger takes it there.
class deferred_reply {
  public:
    deferred_reply() = default;   // for no client

    // As if the hook had returned it: "" is 250 OK. Harmless when the client, or the server, has gone.
    void answer(std::string_view status = {}) const;

  private:
    friend class SMTPChannel;
    friend class SMTPServer;
    friend struct message_options;
    struct owed;
    explicit deferred_reply(std::shared_ptr<owed> reply) : owed_(std::move(reply)) {}
    std::shared_ptr<owed> owed_;
};

// What process_message() is told beyond Python's four arguments: its kwargs.
struct message_options {
    std::vector<std::string> mail_options;   // upper case, as in {"BODY=8BITMIME", "SMTPUTF8"}
    std::vector<std::string> rcpt_options;   // of the last RCPT

    // Take over the reply: what process_message() returns is then ignored, and the client waits. Repeated calls return
    // the same token. After process_message() has returned, the token does nothing.
    deferred_reply defer() const;
    // The channel that the message came by; null when the client has gone, or the reply has been given.
    SMTPChannel* channel() const;

  private:
    friend class SMTPChannel;
    std::weak_ptr<deferred_reply::owed> owed_;
};

// One client's conversation. smtpd.py: SMTPChannel
class SMTPChannel : public asynchat::async_chat {
  public:
    enum state { COMMAND = 0, DATA = 1 };
    using argument = std::optional<std::string_view>;   // what follows the verb; None when there is no space
    using command = void (SMTPChannel::*)(argument);

    SMTPServer* smtp_server;       // null when the server has gone; the channel is closed then
    asyncore::socket_type* conn;   // the same as *socket
    std::size_t data_size_limit;   // 0: none
    bool enable_SMTPUTF8;
    bool _decode_data;
    int smtp_state = COMMAND;
    std::string seen_greeting;    // the argument of HELO or EHLO
    bool extended_smtp = false;   // EHLO was said
    std::string mailfrom;         // "" before MAIL (None in Python)
    std::vector<std::string> rcpttos;
    bool require_SMTPUTF8 = false;
    std::vector<std::string> mail_options, rcpt_options;   // of the last MAIL and RCPT that were accepted
    std::string received_lines;                            // what has come of the line, or of the message
    std::string received_data;                             // the last message
    std::size_t num_bytes = 0;   // received of the line or message; past its limit no more are counted
    std::string fqdn;
    asyncore::address peer;

    std::size_t command_size_limit = 512;                     // bytes of a line, without CR LF
    std::map<std::string, std::size_t> command_size_limits;   // by verb, after EHLO
    std::size_t max_command_size_limit() const;

    std::chrono::milliseconds idle_timeout, data_timeout;   // these three as in options
    std::size_t rcpt_limit;

    // With the server's settings, or others. Throws std::invalid_argument for SMTPUTF8 together with decode_data.
    // Says nothing yet: see start().
    SMTPChannel(SMTPServer& server, std::unique_ptr<asyncore::socket_type> conn, const asyncore::address& addr);
    SMTPChannel(SMTPServer& server, std::unique_ptr<asyncore::socket_type> conn, const asyncore::address& addr,
                const options& with);
    ~SMTPChannel() override;
    std::string class_name() const override { return "smtpd.SMTPChannel"; }

    // Sends the banner: what Python does at the end of the constructor.
    virtual void start();
    // Ends the conversation with 421, at once or after the message in hand, no later than `bound`.
    void stop(asyncore::clock::time_point bound);

    // A line; CR LF is added. Several: push(reply{250, "one\ntwo"}.line()). What is pushed in one event of the loop is
    // sent together.
    void push(std::string_view msg) override;
    void handle_read() override;
    void set_socket(std::unique_ptr<asyncore::socket_type> sock, asyncore::map_type* map = nullptr) override;
    void collect_incoming_data(std::string_view data) override;
    void found_terminator() override;

    // The method of a verb, given in upper case; null: there is none. Override it to add verbs:
    // if (verb == "AUTH") return static_cast<command>(&MyChannel::smtp_AUTH);
    virtual command find_command(std::string_view verb);

    // Take over the reply to the command or the message under way, in a hook or a method of a verb: what that returns
    // is then ignored, and the channel pauses until the token's answer(). Calling it again gives the same token. In
    // refuse_MAIL and refuse_RCPT "" or a 2yz takes the address. Not in Python.
    deferred_reply defer();

    virtual void smtp_HELO(argument arg);
    virtual void smtp_EHLO(argument arg);
    virtual void smtp_NOOP(argument arg);
    virtual void smtp_QUIT(argument arg);
    virtual void smtp_HELP(argument arg);
    virtual void smtp_VRFY(argument arg);
    virtual void smtp_MAIL(argument arg);
    virtual void smtp_RCPT(argument arg);
    virtual void smtp_RSET(argument arg);
    virtual void smtp_DATA(argument arg);
    virtual void smtp_EXPN(argument arg);

    void close() override;
    void resume() override;   // the idle clock, which a pause stops, starts anew
    void handle_close() override;
    void handle_write() override;
    asyncore::clock::time_point deadline() override;
    void handle_timeout() override;

  protected:
    // Name and value (none: True in Python), as they were given; where a name comes twice, the last one counts.
    using parameters = std::vector<std::pair<std::string_view, std::optional<std::string_view>>>;

    // What is left of `arg` after the keyword, stripped; "" without it.
    static std::string_view _strip_command_keyword(std::string_view keyword, std::string_view arg);
    // The address and what follows it; nothing when it is malformed.
    static std::optional<std::pair<std::string, std::string_view>> _getaddr(std::string_view arg);
    // The parameters; nothing when one is malformed.
    static std::optional<parameters> _getparams(const std::vector<std::string>& params);
    void _set_post_data_state();
    void _set_rset_state();

    // A sender or a recipient that is written as it should be: "" takes it, with 250 OK; anything else is the reply
    // that refuses it, such as "550 no such user". Not in Python.
    virtual std::string refuse_MAIL(const std::string& /*address*/) { return ""; }
    virtual std::string refuse_RCPT(const std::string& /*address*/) { return ""; }
    // What EHLO offers besides, a line each: {"AUTH PLAIN LOGIN"}. Not in Python.
    virtual std::vector<std::string> extensions() const { return {}; }
    // The syntax of a verb, as HELP and the 501 replies tell it; "" when there is none. Not in Python.
    virtual std::string syntax(std::string_view verb) const;
    // Gives the client the reply that it waits for, and the channel goes on.
    void answer(std::string_view reply);
    // All tokens of defer() have gone, and none has answered: 451.
    virtual void answer_lost();

  private:
    friend struct message_options;
    friend struct deferred_reply::owed;
    friend class PureProxy;
    virtual ProxyChannel* proxy_channel() { return nullptr; }   // this one, when it relays as it goes
    // MAIL and RCPT are right and their values are set.
    virtual void answer_MAIL() { push("250 OK"); }
    virtual void answer_RCPT() { push("250 OK"); }
    template <typename Event>
    void gather(Event event);
    void execute(std::string_view line, std::size_t size);
    void finish(const std::shared_ptr<deferred_reply::owed>& reply, std::optional<std::string> status,
                const std::exception_ptr& thrown = nullptr);
    std::exception_ptr log_unless_ExitNow(std::string_view what);
    bool refused(const std::string& reply);
    void handle_command(std::string_view line, std::size_t size);
    void handle_message(std::string&& message, std::size_t size);
    void make_room(std::size_t more);
    bool in_hand() const { return smtp_state == DATA || paused(); }
    void say_goodbye(std::string_view reply);
    void stop_when_idle();

    asyncore::clock::time_point active_ = asyncore::clock::now();   // when the idle clock was set
    asyncore::clock::time_point data_since_{};                      // when data_timeout's was
    std::optional<asyncore::clock::time_point> stop_by_;            // see stop()
    deferred_reply::owed* owed_ = nullptr;                          // the reply that is still to come
    std::shared_ptr<deferred_reply::owed> asked_;         // that of the command under way, when it is deferred
    std::shared_ptr<deferred_reply::owed> left_behind_;   // an ExitNow leaves the loop: 451, should it be entered again
    std::size_t declared_size_ = 0;                       // SIZE= of this MAIL
    std::size_t fetched_ = 0;                             // bytes of replies, since the idle clock was set
    std::size_t utf8_size_ = 0;                           // bytes of received_lines that are known to be UTF-8
    std::size_t data_left_ = 0;                           // bytes until data_since_ is set anew
    bool data_starts_ = false;                            // the CR LF of the DATA line is still to come: see smtp_DATA
    bool gathering_ = false;                              // an event is under way, and replies wait for its end
    enum { nothing, sender, recipient } deferred_ = nothing;   // what a hook has put off refusing
    bool executing_ = false;                                   // a command is under way,
    bool replied_ = false;                                     // and it has pushed something
};

// Listens, and makes a channel for each client. smtpd.py: SMTPServer
class SMTPServer : public asyncore::dispatcher {
  public:
    asyncore::address _localaddr, _remoteaddr;
    options settings;   // data_size_limit, enable_SMTPUTF8 and so on: what each new channel gets

    // Binds and listens. `remoteaddr` is for subclasses that pass mail on. Throws std::system_error when it
    // can't listen there, std::invalid_argument for SMTPUTF8 together with decode_data.
    SMTPServer(const asyncore::address& localaddr, const asyncore::address& remoteaddr, const options& with = {});
    ~SMTPServer() override;   // closes the channels
    std::string class_name() const override { return "smtpd.SMTPServer"; }

    // Whether it passes mail on to any address, for any client: main.cpp then warns when strangers can reach it.
    virtual bool relays() const { return false; }

    // Makes the channel of a client: override it to use one of your own.
    virtual std::unique_ptr<SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                       const asyncore::address& from);

    // Called with each message; override it. `data` is the channel's received_data: read it, or move from it
    // to keep it. Line ends are \n, and the last line has none; the empty sender is "<>". Returns the reply, nothing
    // for 250 OK. What it throws is logged, and the client gets 451.
    virtual std::optional<std::string> process_message(const asyncore::address& peer, const std::string& mailfrom,
                                                       const std::vector<std::string>& rcpttos, std::string&& data,
                                                       const message_options& kwargs);

    // Stops listening. Each channel says 421: at once, or when the message in hand is done, and within `grace`. The
    // loop goes on until they are gone. No channel may destroy the server meanwhile.
    virtual void stop(std::chrono::milliseconds grace);
    // Throws when it can't do its work as it is set up. The program asks once, when it has dropped its privileges.
    virtual void check_settings() const {}

    bool readable() override { return !accepting_paused_; }
    asyncore::clock::time_point deadline() override;
    void handle_timeout() override { accepting_paused_ = false; }
    void handle_accept() override;
    void handle_accepted(std::unique_ptr<asyncore::socket_type> conn, const asyncore::address& addr) override;

  private:
    friend class SMTPChannel;
    void turn_away();
    void pause_accepting();

    std::set<SMTPChannel*> channels_;
    std::size_t message_size_ = 0;   // bytes of the last message, as they came
    asyncore::socket_type spare_;    // given up for a moment when descriptors run out
    asyncore::clock::time_point accept_again_at_{};
    bool accepting_paused_ = false;
};

// Prints each message on stdout. A stdout that can't be written to is ExitNow. smtpd.py: DebuggingServer
class DebuggingServer : public SMTPServer {
  public:
    using SMTPServer::SMTPServer;
    std::string class_name() const override { return "smtpd.DebuggingServer"; }
    std::optional<std::string> process_message(const asyncore::address& peer, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const message_options& kwargs) override;

  protected:
    void _print_message_content(const asyncore::address& peer, std::string_view data, std::ostream& out) const;
};

// ---------------------------------------------------------------------------------------------------------
// The client's side
// ---------------------------------------------------------------------------------------------------------

// What a server has answered. 250 "OK"; -1: nothing that makes sense, and `text` says why.
struct reply {
    int code = -1;
    std::string text;   // without the code; several lines are joined by \n

    std::string line() const;   // as it is sent: "250 OK"; a line each with its code when there are several
};

// A message to be sent: a string; its copies share the text.
struct letter {
    std::shared_ptr<std::string> text;

    letter(std::string message) : text(std::make_shared<std::string>(std::move(message))) {}
    letter(const char* message) : letter(std::string(message)) {}
    std::size_t size() const;   // bytes with CR LF line ends, before dots are doubled
};

// A session with a server, from the client's side, in the same loop as everything else. One command at a time:
// each method sends one and gives the reply to `then`, once, also when the connection is lost (code -1, or
// 421; the session is closed then). Give it to its map once it has begun to connect:
//
//     auto session = std::make_unique<smtpd::SMTP>();
//     session->connect({"mail.example", 25}, [](const smtpd::reply& greeting) { ... });
//     if (session->_fileno >= 0) asyncore::socket_map.own(std::move(session));
//
// A session ends in one of these ways:
//
//     quit()      the command under way is finished, then QUIT is said; a message under way is cut off
//     abandon()   the same, and no handler is called any more (forget()): its user has no use for it
//     fail(why)   it can't go on: it closes, and the handler gets -1 and why
//     close()     at once, without a word to the server; the handler gets -1
//
// A session that its map owns may be ended by any handler, its own included: quit() or close(). One that you own must
// not be destroyed in its own handler or on_close. Destroyed while a reply is awaited, it calls on_close and nothing
// else. A handler that is null is std::invalid_argument; what on_close throws is logged.
//
// smtplib.py: SMTP
class SMTP : public asynchat::async_chat {
  public:
    using handler = std::function<void(const reply&)>;
    using refused = std::map<std::string, reply>;   // recipient -> why

    std::string stage = "connect";                       // the command that was sent last; "message" after DATA
    std::string local_hostname;                          // for EHLO; "": this side's address, as in [127.0.0.1]
    bool does_esmtp = false;                             // EHLO was accepted
    std::map<std::string, std::string> esmtp_features;   // what it offered: "SIZE" -> "33554432"
    std::size_t maxline = 8192, maxreply = 65536;        // bytes; what is longer makes no sense
    std::function<void()> on_close;                      // called when the session ends, for whatever reason

    explicit SMTP(asyncore::map_type* map = nullptr, const timeouts& wait = {});
    ~SMTP() override;
    std::string class_name() const override { return "smtpd.SMTP"; }

    // Connects and waits for the greeting: anything but 220 is a refusal. A name may block while it is resolved
    // (POSIX has nothing better); when an address does not answer, the next one is tried. An error that is known
    // at once is reported at once. smtplib.py: SMTP.connect
    void connect(const asyncore::address& server, handler then);
    void connect(const asyncore::address& server) override {
        connect(server, [](const reply&) {});
    }
    // The same as far as EHLO, or HELO: 250, or what stopped it.
    void open(const asyncore::address& server, handler then);

    // smtplib.py: SMTP.docmd
    void docmd(const std::string& cmd, handler then);
    // smtplib.py: SMTP.ehlo
    void ehlo(handler then);
    // smtplib.py: SMTP.helo
    void helo(handler then) { docmd("HELO " + own_name(), std::move(then)); }
    // smtplib.py: SMTP.ehlo_or_helo_if_needed
    virtual void ehlo_or_helo_if_needed(handler then);
    // smtplib.py: SMTP.has_extn
    bool has_extn(const std::string& name) const { return esmtp_features.count(name) > 0; }
    // The options are sent as they are, as in {"SIZE=1000", "BODY=8BITMIME"}. smtplib.py: SMTP.mail
    void mail(const std::string& sender, const std::vector<std::string>& with, handler then);
    // smtplib.py: SMTP.rcpt
    void rcpt(const std::string& recipient, handler then);
    // Sends DATA and the message: every line end becomes CR LF, dots are doubled, a last line end is added when it
    // is missing. The reply is the one to the message, or that to DATA when it is not 354; any yes to the message is
    // 250. smtplib.py: SMTP.data
    void data(letter msg, handler then);
    // smtplib.py: SMTP.rset
    void rset(handler then) { docmd("RSET", std::move(then)); }
    // Says QUIT, after the command under way, and closes soon. smtplib.py: SMTP.quit
    void quit();
    // MAIL, each RCPT, DATA, for a session that is past EHLO. Recipients that are refused are in `refused`; when
    // `all` is set, one refusal is enough to give up. The reply is 250 when the message was taken, or what
    // stopped it. An address that is not ASCII takes a server with SMTPUTF8. smtplib.py: SMTP.sendmail
    void sendmail(const std::string& from_addr, const std::vector<std::string>& to_addrs, letter msg,
                  const std::vector<std::string>& mail_options, bool all,
                  std::function<void(const reply&, const refused&)> then);

    // From now on no handler is called, nor on_close.
    void forget();
    // forget() and quit(): for a session that is of no use any more.
    void abandon() noexcept;

    void collect_incoming_data(std::string_view data) override;
    void found_terminator() override;
    void handle_connect() override;
    void handle_write() override;
    void handle_close() override;
    void handle_error() override;
    asyncore::clock::time_point deadline() override;
    void handle_timeout() override;
    void close() override;

  protected:
    // Ends the session: the handler that waits gets -1 and why.
    void fail(const std::string& why);
    virtual std::string ehlo_msg() const { return "EHLO"; }
    // How many replies follow a message that `recipients` were accepted for.
    virtual std::size_t data_replies(std::size_t /*recipients*/) const { return 1; }

  private:
    friend class PureProxy;
    struct mailing;
    void attempt();
    void expect(handler then, std::chrono::milliseconds wait);
    void report(reply answer);
    void say_closed();
    bool stopped() const { return stop_by_ && *stop_by_ <= asyncore::clock::now(); }
    void send_message();
    void message_goes_on();
    void send_recipients(const std::shared_ptr<mailing>& it);
    std::string own_name() const;

    timeouts wait_;
    handler then_;   // waits for the reply
    asyncore::clock::time_point due_ = asyncore::clock::time_point::max();
    std::vector<asyncore::address> candidates_;   // addresses not tried yet
    std::string line_, why_;
    reply answer_, worst_;
    std::unique_ptr<asynchat::producer> message_;
    std::shared_ptr<const asyncore::clock::time_point> stop_by_;   // of the proxy that it works for
    // What comes next, by the code that is a yes: to a command that is any below 400.
    enum class awaited { answer = 0, greeting = 220, end = 250, go_ahead = 354 };
    awaited next_ = awaited::answer;
    bool cut_off_ = false;   // the server has broken off the message
    bool quitting_ = false;
    std::size_t accepted_ = 0;       // recipients of this transaction
    std::size_t replies_left_ = 1;   // that the command under way will bring
};

// The same with LHLO, and a reply for each recipient after the message: the worst of them is reported
// (RFC 2033). smtplib.py: LMTP
class LMTP : public SMTP {
  public:
    using SMTP::SMTP;
    std::string class_name() const override { return "smtpd.LMTP"; }

  protected:
    std::string ehlo_msg() const override { return "LHLO"; }
    std::size_t data_replies(std::size_t recipients) const override { return recipients; }
};

// Thrown by sendmail() when no recipient got the message. smtplib.py: SMTPResponseException
class SMTPResponseException : public std::runtime_error {
  public:
    reply answer;
    std::string stage;          // what was answered so: "connect", "EHLO", "MAIL", "RCPT", "DATA", or "message"
    SMTP::refused recipients;   // those that were refused, each with its reply
    explicit SMTPResponseException(const reply& why, std::string at = {}, SMTP::refused who = {})
        : std::runtime_error(why.line()), answer(why), stage(std::move(at)), recipients(std::move(who)) {}
};

// What sendmail() may be told besides.
struct sendmail_options {
    std::vector<std::string> mail_options{};   // such as "BODY=8BITMIME": sent where the server offers it
    std::string local_hostname{};              // for EHLO
    std::chrono::milliseconds total{0};        // for all of it; 0: no limit but the timeouts
};

// Sends one message and waits until it is done, in a loop of its own: for small programs. Returns the recipients
// that were refused while others got it. smtplib.py: SMTP.sendmail
SMTP::refused sendmail(const asyncore::address& server, const std::string& from_addr,
                       const std::vector<std::string>& to_addrs, std::string msg, const timeouts& wait = {},
                       const sendmail_options& with = {});

// ---------------------------------------------------------------------------------------------------------
// The proxies
// ---------------------------------------------------------------------------------------------------------

// Passes each message on to `remoteaddr`, and each reply back: to MAIL and RCPT as they come (250 OK for a yes,
// the server's own words for a no), and to the message. A server that is lost or makes no sense is 451 for the client,
// and the transaction is over. Each client that can connect can send anywhere: mind where it listens.
// smtpd.py: PureProxy
class PureProxy : public SMTPServer {
  public:
    using SMTPServer::SMTPServer;
    ~PureProxy() override;
    std::string class_name() const override { return "smtpd.PureProxy"; }
    bool relays() const override { return true; }
    void check_settings() const override;                  // the next server must be another one
    void stop(std::chrono::milliseconds grace) override;   // the sessions with the next server end with the channels
    std::unique_ptr<SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                               const asyncore::address& addr) override;

    // Inserts X-Peer and sends the message on. To filter, override it, and call this one for what shall pass; a
    // changed sender or recipients are fine: the message then goes by _deliver().
    std::optional<std::string> process_message(const asyncore::address& peer, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const message_options& kwargs) override;

    // Sends a whole message by a connection of its own, to all of the recipients or to none; `then` gets the
    // reply.
    void _deliver(const std::string& mailfrom, const std::vector<std::string>& rcpttos, std::string data,
                  SMTP::handler then);

  protected:
    friend class ProxyChannel;
    // Where a recipient's mail goes: two servers, of which PureProxy has one.
    enum class side { upstream, lists };
    virtual side route(const std::string& /*recipient*/) const { return side::upstream; }
    // The name by which that side knows the recipient.
    virtual std::string address_for(side /*to*/, const std::string& recipient) const { return recipient; }
    // True: upstream answers MAIL. False: MAIL gets 250, and a side is asked when it has its first recipient.
    virtual bool asks_at_MAIL() const { return true; }
    // A session with that side, before it connects: override it for one of your own, with TLS say.
    virtual std::unique_ptr<SMTP> make_session(side to) const;
    // Sends the message on the transaction that the client's channel has open there, or by a connection of its own
    // when a subclass has changed the envelope. `then` gets the reply.
    void relay(side to, const std::string& mailfrom, const std::vector<std::string>& rcpttos, letter message,
               const message_options& kwargs, SMTP::handler then);

  private:
    void deliver(side to, const std::string& mailfrom, const std::vector<std::string>& rcpttos, letter message,
                 const std::vector<std::string>& mail_options, SMTP::handler then);
    std::unique_ptr<SMTP> new_session(side to) const;
    const asyncore::address& address_of(side to) const;

    std::set<SMTP*> deliveries_;   // sessions of deliver()
    // The time by which all sessions end: see stop().
    std::shared_ptr<asyncore::clock::time_point> stop_by_ =
        std::make_shared<asyncore::clock::time_point>(asyncore::clock::time_point::max());
};

// The channel of a proxy: it holds a transaction with each side while its client holds one with us.
class ProxyChannel : public SMTPChannel {
  public:
    ProxyChannel(PureProxy& server, std::unique_ptr<asyncore::socket_type> conn, const asyncore::address& addr);
    std::string class_name() const override { return "smtpd.ProxyChannel"; }
    void smtp_RCPT(argument arg) override;
    void smtp_RSET(argument arg) override;
    void smtp_DATA(argument arg) override;
    void close() override;

  private:
    friend class PureProxy;
    void answer_MAIL() override;
    void answer_RCPT() override;
    ProxyChannel* proxy_channel() override { return this; }
    void answer_lost() override;
    // The session with one destination, and what it has been told of the client's transaction.
    struct transaction {
        ProxyChannel& channel;
        const PureProxy::side to;
        SMTP* session = nullptr;               // owned by the map
        bool begun = false;                    // it has accepted MAIL
        bool utf8 = false;                     // with SMTPUTF8
        bool stale = false;                    // it may know of a transaction: RSET before the next one
        std::string mailfrom{};                // as it was told
        std::vector<std::string> accepted{};   // recipients that it has accepted, as the client calls them

        ~transaction() { abandon(); }
        PureProxy& proxy() const { return channel.proxy(); }
        void begin(SMTP::handler then);
        void reset(const std::function<void()>& then);
        void say_MAIL(SMTP::handler then);
        void say_RCPT(SMTP::handler then);
        std::string refusal(const reply& said);
        void abandon();
    };
    PureProxy& proxy() const { return static_cast<PureProxy&>(*smtp_server); }
    transaction& of(PureProxy::side to) { return transactions_[static_cast<std::size_t>(to)]; }
    void lose();

    transaction transactions_[2] = {{*this, PureProxy::side::upstream}, {*this, PureProxy::side::lists}};
    bool lost_ = false;   // the last transaction was lost, and there is no new one yet
};

// A proxy in front of Mailman 3: what is addressed to one of its lists goes to Mailman by LMTP, the rest
// upstream, without X-Peer. A list is NAME@DOMAIN, and NAME-owner, -request, -join, -leave and so on. Upstream
// gets its copy first: when Mailman then fails, the client is told so and sends both again, and upstream has the
// message twice. smtpd.py: MailmanProxy
class MailmanProxy : public PureProxy {
  public:
    using PureProxy::PureProxy;
    std::string class_name() const override { return "smtpd.MailmanProxy"; }
    std::optional<std::string> process_message(const asyncore::address& peer, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const message_options& kwargs) override;

    void check_settings() const override;   // and list_exists() must be able to tell

    // Is there such a list? Both in lower case. Here: a folder NAME.DOMAIN in settings.mailman_lists. Throws
    // std::system_error when that can't be told: the recipient gets 451.
    virtual bool list_exists(const std::string& listname, const std::string& domain) const;
    // Gives Mailman the message for its recipients, and `then` the reply. Here: by LMTP. Without a
    // settings.mailman_lmtp the recipients are accepted because list_exists() says so, and this is to be overridden.
    virtual void enqueue(const std::string& mailfrom, const std::vector<std::string>& recipients, std::string message,
                         const message_options& kwargs, SMTP::handler then);

  protected:
    side route(const std::string& recipient) const override;
    std::string address_for(side to, const std::string& recipient) const override;
    bool asks_at_MAIL() const override { return false; }

  private:
    void enqueue_next(const std::string& mailfrom, std::vector<std::string> recipients, letter message,
                      const message_options& kwargs, SMTP::handler then);
};

// ---------------------------------------------------------------------------------------------------------
// The command line's classes
// ---------------------------------------------------------------------------------------------------------

using server_factory = std::function<std::unique_ptr<SMTPServer>(
    const asyncore::address& localaddr, const asyncore::address& remoteaddr, const options& with)>;

// The classes that -c knows, by name. An object of this type adds one: with main.cpp linked to it, a program
// that consists of a class and `static smtpd::server_class mine("MyServer", ...)` has the whole command line.
struct server_class {
    server_class(const std::string& name, server_factory make) { all()[name] = std::move(make); }
    static std::map<std::string, server_factory>& all();
};

}   // namespace v1
}   // namespace smtpd

#endif
