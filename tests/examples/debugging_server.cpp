// The server that prints what it gets: `python -m smtpd -n -c DebuggingServer localhost:1025`.
#include "smtpd.hpp"

int main() {
    smtpd::DebuggingServer server({"127.0.0.1", 1025}, {});
    asyncore::loop();
}
