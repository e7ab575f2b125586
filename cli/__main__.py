from rwkv_stream.cli import main

main()
