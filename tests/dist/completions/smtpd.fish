# Completion for smtpd in fish.
complete -c smtpd -f
complete -c smtpd -s n -l nosetuid -d 'Keep the user that started it'
complete -c smtpd -s c -l class -x -a 'DebuggingServer PureProxy MailmanProxy SMTPServer' -d 'What to do with the messages'
complete -c smtpd -s s -l size -x -d 'Refuse larger messages'
complete -c smtpd -s u -l smtputf8 -d 'Offer SMTPUTF8'
complete -c smtpd -l mailman-lists -x -a '(__fish_complete_directories)' -d 'The folder of the lists of Mailman'
complete -c smtpd -l mailman-lmtp -x -d 'Where Mailman takes messages'
complete -c smtpd -s d -l debug -d 'Print the conversation on stderr'
complete -c smtpd -s V -l version -d 'Print the version, and exit'
complete -c smtpd -s h -l help -d 'Print the options, and exit'
