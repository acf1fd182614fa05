// TLS, by OpenSSL, for everything that smtpd.hpp has: STARTTLS (RFC 3207) and SMTPS (RFC 8314).
//
// A server of your own, DebuggingServer, or PureProxy with tls::channel<smtpd::ProxyChannel> for its channels:
//
//     auto certificate = tls::server_context("cert.pem", "key.pem");
//     tls::server<MyServer> server({"127.0.0.1", 1025}, {}, certificate, tls::mode::offered);
//
// A session with a server, whose certificate and name are checked: what does not fit is a reply of -1 that says why.
//
//     auto session = std::make_unique<tls::session<smtpd::SMTP>>(tls::client_context(), "mail.example",
//                                                                tls::mode::required);
//     session->open({"mail.example", 587}, [](const smtpd::reply& answer) { ... });
//
// For a proxy's own sessions, override make_session() (tls_proxy.cpp). For the mail_fixture of a test, see
// tls_fixture.cpp. OpenSSL 1.1.1 or newer: -lssl -lcrypto.
//
// How it works. tls::socket_type is a socket whose recv() and send() encrypt. OpenSSL reads and writes through the
// functions of the socket below: so nothing blocks, and no write raises SIGPIPE. The handshake is part of the first
// recv() or send(), and of as many as it takes. One thing is special: a recv() may have to wait until output is
// possible, and a send() until input has come. aware<> tells the loop so; else it would spin, or sleep for ever.

#ifndef TLS_HPP
#define TLS_HPP

#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#include "smtpd.hpp"

namespace tls {

// What OpenSSL has to say. Who catches errors of the system catches this one, too.
struct error : std::system_error {
    std::string why;
    explicit error(std::string text) : system_error(EPROTO, std::generic_category()), why(std::move(text)) {}
    const char* what() const noexcept override { return why.c_str(); }
};

inline error last_error(const std::string& about = "TLS") {
    const unsigned long code = ERR_peek_error();
    const char* const reason = ERR_reason_error_string(code);
    if (ERR_GET_LIB(code) == ERR_LIB_SYS) return error(about + ": " + asyncore::_strerror(ERR_GET_REASON(code)));
    return error(about + ": " + (reason ? reason : "OpenSSL has failed"));
}

// When TLS begins.
enum class mode {
    offered,    // by STARTTLS: a server takes mail without it, too; a client sends it to a server that has no STARTTLS
    required,   // by STARTTLS: no mail without it
    at_once     // with the connection: SMTPS
};

// Settings and certificates, for any number of connections. To renew a certificate in a running program, give its
// server a new context: connections that are open keep the old one.
using context = std::shared_ptr<SSL_CTX>;

inline context new_context(const SSL_METHOD* method) {
    ERR_clear_error();
    const context made(SSL_CTX_new(method), &SSL_CTX_free);
    if (!made) throw last_error();
    SSL_CTX_set_min_proto_version(made.get(), TLS1_2_VERSION);
    SSL_CTX_set_options(made.get(), SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
    // A send() that is repeated has the same bytes, somewhere else perhaps, and more of them.
    SSL_CTX_set_mode(made.get(), SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_mode(made.get(), SSL_MODE_RELEASE_BUFFERS);   // a connection that is idle needs less memory
    return made;
}

// For a server: files in PEM format; behind the certificate, those that vouch for it. Throws tls::error.
inline context server_context(const std::string& certificate, const std::string& key) {
    context made = new_context(TLS_server_method());
    if (SSL_CTX_use_certificate_chain_file(made.get(), certificate.c_str()) != 1) throw last_error(certificate);
    if (SSL_CTX_use_PrivateKey_file(made.get(), key.c_str(), SSL_FILETYPE_PEM) != 1) throw last_error(key);
    return made;
}

// For a client: whom it trusts, a file in PEM format; "": those that the system trusts. Throws tls::error.
inline context client_context(const std::string& authorities = "") {
    context made = new_context(TLS_client_method());
    const int found = authorities.empty() ? SSL_CTX_set_default_verify_paths(made.get())
                                          : SSL_CTX_load_verify_locations(made.get(), authorities.c_str(), nullptr);
    if (found != 1) throw last_error(authorities);
    SSL_CTX_set_verify(made.get(), SSL_VERIFY_PEER, nullptr);
    return made;
}

// ---------------------------------------------------------------------------------------------------------
// The socket
// ---------------------------------------------------------------------------------------------------------

class socket_type : public asyncore::socket_type {
  public:
    // The server's side of a connection.
    socket_type(asyncore::socket_type&& plain, const context& with)
        : asyncore::socket_type(std::move(plain)), ssl_(SSL_new(with.get()), &SSL_free) {
        BIO* const below = ssl_ ? BIO_new(method()) : nullptr;
        if (!below) throw last_error();
        BIO_set_data(below, this);
        BIO_set_init(below, 1);
        SSL_set_bio(ssl_.get(), below, below);   // which owns it now
        SSL_set_accept_state(ssl_.get());
    }
    // The client's side: it refuses a certificate that is not for `host`, a name or an IP address.
    socket_type(asyncore::socket_type&& plain, const context& with, const std::string& host)
        : socket_type(std::move(plain), with) {
        SSL_set_connect_state(ssl_.get());
        recv_waits_ = true;                                                // the client begins
        if (host.empty()) throw error("TLS: there is no name to check");   // OpenSSL would take any
        if (X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl_.get()), host.c_str()) == 1) return;
        if (SSL_set1_host(ssl_.get(), host.c_str()) != 1 || SSL_set_tlsext_host_name(ssl_.get(), host.c_str()) != 1)
            throw last_error();
    }

    std::size_t recv(char* buffer, std::size_t size, int flags = 0) override {
        if (flags & MSG_OOB) return asyncore::socket_type::recv(buffer, size, flags);   // an urgent byte is no TLS
        std::size_t done = 0;
        const int why = attempt([&] { return SSL_read_ex(ssl_.get(), buffer, size, &done); });
        recv_waits_ = why == SSL_ERROR_WANT_WRITE;
        if (encrypted()) send_waits_ = false;
        if (why == SSL_ERROR_NONE || why == SSL_ERROR_ZERO_RETURN) return done;
        fail(why);
    }
    std::size_t send(std::string_view data, int = 0) override {
        std::size_t done = 0;
        if (data.empty()) return done;
        const int why = attempt([&] { return SSL_write_ex(ssl_.get(), data.data(), data.size(), &done); });
        send_waits_ = why == SSL_ERROR_WANT_READ;
        if (why != SSL_ERROR_NONE) fail(why);
        return done;
    }
    // What has been decrypted, and not been asked for yet.
    bool pending() const override { return SSL_pending(ssl_.get()) > 0; }
    void close() override {
        if (fd_ >= 0 && encrypted())
            attempt([&] { return SSL_shutdown(ssl_.get()); });   // a farewell, as far as it goes
        asyncore::socket_type::close();
    }

    bool encrypted() const { return SSL_is_init_finished(ssl_.get()) == 1; }   // the handshake is done
    bool recv_waits_for_output() const { return recv_waits_; }
    bool send_waits_for_input() const { return send_waits_; }
    SSL* ssl() const { return ssl_.get(); }   // for SSL_get_cipher() and the like

  private:
    template <typename Call>
    int attempt(Call call) {
        if (broken_) return SSL_ERROR_SYSCALL;
        ERR_clear_error();
        return SSL_get_error(ssl_.get(), call());
    }
    [[noreturn]] void fail(int why) {
        if (why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE)
            throw std::system_error(EAGAIN, std::generic_category(), "TLS");
        if (std::exchange(broken_, true) || why != SSL_ERROR_SSL)
            throw std::system_error(errno_, std::generic_category(), "TLS");
        const long verified = SSL_get_verify_result(ssl_.get());
        if (verified == X509_V_OK || encrypted()) throw last_error();
        throw error(std::string("certificate verify failed: ") + X509_verify_cert_error_string(verified));
    }

    // How OpenSSL reads and writes.
    static const BIO_METHOD* method() {
        static BIO_METHOD* const made = [] {
            BIO_METHOD* const it = BIO_meth_new(BIO_TYPE_SOURCE_SINK | BIO_get_new_index(), "asyncore::socket_type");
            if (!it) throw last_error();
            BIO_meth_set_write(it, [](BIO* bio, const char* data, int size) {
                return transfer(bio, BIO_FLAGS_WRITE, [&](socket_type& sock) {
                    return sock.asyncore::socket_type::send({data, static_cast<std::size_t>(size)});
                });
            });
            BIO_meth_set_read(it, [](BIO* bio, char* buffer, int size) {
                return transfer(bio, BIO_FLAGS_READ, [&](socket_type& sock) {
                    return sock.asyncore::socket_type::recv(buffer, static_cast<std::size_t>(size));
                });
            });
            BIO_meth_set_ctrl(it, [](BIO*, int what, long, void*) { return long{what == BIO_CTRL_FLUSH}; });
            return it;
        }();
        return made;
    }
    // No exception may pass through OpenSSL.
    template <typename Call>
    static int transfer(BIO* bio, int direction, Call call) noexcept {
        auto& sock = *static_cast<socket_type*>(BIO_get_data(bio));
        BIO_clear_retry_flags(bio);
        try {
            return static_cast<int>(call(sock));
        } catch (const std::system_error& failed) {
            const int err = failed.code().value();
            if (err == EAGAIN || err == EWOULDBLOCK)
                BIO_set_flags(bio, direction | BIO_FLAGS_SHOULD_RETRY);
            else
                sock.errno_ = err;
        } catch (...) {
            sock.errno_ = ENOMEM;
        }
        return -1;
    }

    std::unique_ptr<SSL, decltype(&SSL_free)> ssl_;
    int errno_ = EPIPE;         // why no call is of use any more; an end without a farewell is no more than that
    bool broken_ = false;       // no call is
    bool recv_waits_ = false;   // until output is possible
    bool send_waits_ = false;   // until input has come
};

// The same connection once more: for a socket that takes the place of another.
inline asyncore::socket_type duplicate(const asyncore::socket_type& plain) {
    const int fd = ::fcntl(plain.fileno(), F_DUPFD_CLOEXEC, 0);
    if (fd < 0) throw std::system_error(errno, std::generic_category(), "dup");
    return asyncore::socket_type(fd);
}

// The server's side of TLS over a connection that it takes over: for a channel that is none of those below.
inline std::unique_ptr<asyncore::socket_type> wrap(asyncore::socket_type&& plain, const context& with) {
    return std::make_unique<socket_type>(std::move(plain), with);
}

// ---------------------------------------------------------------------------------------------------------
// Who uses it
// ---------------------------------------------------------------------------------------------------------

// An async_chat of any kind that waits for what its TLS waits for.
template <typename Base>
class aware : public Base {
  public:
    using Base::Base;

    // Whether all is encrypted now.
    bool encrypted() const { return tls_ && tls_->encrypted(); }

    bool readable() override {
        if (!tls_) return Base::readable();
        return !tls_->recv_waits_for_output() && (tls_->send_waits_for_input() || Base::readable());
    }
    bool writable() override {
        if (!tls_) return Base::writable();
        return tls_->recv_waits_for_output() || (!tls_->send_waits_for_input() && Base::writable());
    }
    void set_socket(std::unique_ptr<asyncore::socket_type> sock, asyncore::map_type* map = nullptr) override {
        Base::set_socket(std::move(sock), map);
        see_socket();
    }
    void handle_write() override { tls_ && tls_->recv_waits_for_output() ? this->handle_read() : Base::handle_write(); }

  protected:
    socket_type* tls_ = nullptr;   // the socket, when it is one of ours

    void see_socket() { tls_ = dynamic_cast<socket_type*>(this->socket.get()); }
};

// A client's conversation, on the server's side. Base: SMTPChannel, ProxyChannel, or a class of your own.
template <typename Base = smtpd::SMTPChannel>
class channel : public aware<Base> {
  public:
    using typename Base::argument;
    using typename Base::command;

    template <typename Server>   // that Base belongs to
    channel(Server& owner, std::unique_ptr<asyncore::socket_type> plain, const asyncore::address& from, context with,
            mode when)
        : aware<Base>(owner, when == mode::at_once ? wrap(std::move(*plain), with) : std::move(plain), from),
          context_(std::move(with)),
          when_(when) {
        this->see_socket();
    }

    command find_command(std::string_view verb) override {
        return verb == "STARTTLS" && when_ != mode::at_once ? static_cast<command>(&channel::smtp_STARTTLS)
                                                            : Base::find_command(verb);
    }
    std::vector<std::string> extensions() const override {
        auto all = Base::extensions();
        if (!this->tls_) all.emplace_back("STARTTLS");
        return all;
    }
    std::string syntax(std::string_view verb) const override {
        return verb == "STARTTLS" ? "STARTTLS" : Base::syntax(verb);
    }
    virtual void smtp_STARTTLS(argument arg) {
        if (arg && !arg->empty()) return this->push("501 Syntax: STARTTLS");
        if (this->tls_) return this->push("503 Error: TLS is active already");
        auto encrypted = std::make_unique<socket_type>(duplicate(*this->socket), context_);   // a failure here is a 451
        this->push("220 Ready to start TLS");
        this->discard_input();                    // nothing that came in the clear may count as encrypted
        this->set_socket(std::move(encrypted));   // sends the 220 first
        // The client begins anew (RFC 3207, 4.2).
        this->_set_rset_state();
        this->seen_greeting.clear();
        this->extended_smtp = false;
    }
    void smtp_MAIL(argument arg) override {
        if (when_ == mode::required && !this->tls_) return this->push("530 Must issue a STARTTLS command first");
        Base::smtp_MAIL(arg);
    }
    // There is nobody yet who could be told of a timeout.
    void handle_timeout() override {
        this->tls_ && !this->encrypted() && !this->paused() ? this->close() : Base::handle_timeout();
    }
    // A client that can't speak TLS, or does not trust us, is no fault of the program.
    void handle_error() override {
        try {
            throw;
        } catch (const error& why) {
            this->log_info(this->addr.str() + ": " + why.what());
            this->close();
        } catch (...) {
            Base::handle_error();
        }
    }

  private:
    context context_;
    mode when_;
};

// A server of any class, with such channels.
template <typename Server, typename Channel = channel<smtpd::SMTPChannel>>
class server : public Server {
  public:
    context certificate;
    mode when;

    server(const asyncore::address& localaddr, const asyncore::address& remoteaddr, context with, mode begin,
           const smtpd::options& options = {})
        : Server(localaddr, remoteaddr, options), certificate(std::move(with)), when(begin) {}
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> plain,
                                                      const asyncore::address& from) override {
        return std::make_unique<Channel>(*this, std::move(plain), from, certificate, when);
    }
};

// A session with a server, on the client's side. Base: SMTP or LMTP. open() and ehlo_or_helo_if_needed() say STARTTLS,
// and then EHLO again.
template <typename Base = smtpd::SMTP>
class session : public aware<Base> {
  public:
    using typename Base::handler;

    session(context with, std::string host, mode when, asyncore::map_type* map = nullptr,
            const smtpd::timeouts& wait = {})
        : aware<Base>(map, wait), context_(std::move(with)), host_(std::move(host)), when_(when) {}

    std::unique_ptr<asyncore::socket_type> make_socket(int family, int type) override {
        if (when_ != mode::at_once) return Base::make_socket(family, type);
        return std::make_unique<socket_type>(asyncore::socket_type(family, type), context_, host_);
    }
    void ehlo_or_helo_if_needed(handler then) override {
        Base::ehlo_or_helo_if_needed([this, then](const smtpd::reply& answer) {
            if (answer.code != 250 || this->tls_ || !this->connected) return then(answer);
            if (this->has_extn("STARTTLS")) return say_STARTTLS(then);
            if (when_ == mode::offered) return then(answer);
            refuse("the server does not offer STARTTLS", then);
        });
    }

  private:
    void say_STARTTLS(const handler& then) {
        this->docmd("STARTTLS", [this, then](const smtpd::reply& answer) {
            if (!this->connected) return then(answer);
            if (answer.code != 220) return refuse("the server does not start TLS: " + answer.line(), then);
            try {
                auto encrypted = std::make_unique<socket_type>(duplicate(*this->socket), context_, host_);
                this->discard_input();
                this->set_socket(std::move(encrypted));
            } catch (const std::system_error& why) {
                return refuse(why.what(), then);
            }
            this->does_esmtp = false;
            this->esmtp_features.clear();
            Base::ehlo_or_helo_if_needed(then);
        });
    }
    void refuse(const std::string& why, const handler& then) {
        this->fail(why);
        then({-1, why});
    }

    context context_;
    std::string host_;
    mode when_;
};

}   // namespace tls

#endif
