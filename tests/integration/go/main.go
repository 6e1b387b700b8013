// A plain gRPC client in another language: produces 100 messages over 5 queues, leases and acknowledges them, and
// checks that every queue came in order. Prints OK.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "spillway.test/client/spillwayv1"
)

const (
	queues      = 5
	messages    = 100
	destination = "go-client"
)

func main() {
	log.SetFlags(0)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(err)
	defer conn.Close()
	client := pb.NewQueueServiceClient(conn)
	produce(ctx, client)
	consume(ctx, client)
	fmt.Println("OK")
}

func produce(ctx context.Context, client pb.QueueServiceClient) {
	stream, err := client.Produce(ctx)
	check(err)
	request := &pb.ProduceRequest{}
	for i := 0; i < messages; i++ {
		request.Records = append(request.Records, &pb.ProduceRecord{
			Destination: destination,
			Tenant:      "acme",
			Key:         fmt.Sprint("key-", i%queues),
			Message:     &pb.Message{Payload: []byte(fmt.Sprint(i)), Headers: map[string]string{"n": fmt.Sprint(i)}},
		})
	}
	check(stream.Send(request))
	response, err := stream.Recv()
	check(err)
	if len(response.Errors) > 0 || len(response.Sequences) != messages {
		log.Fatalf("produce: %v", response)
	}
	check(stream.CloseSend())
}

func consume(ctx context.Context, client pb.QueueServiceClient) {
	lease, err := client.Lease(ctx)
	check(err)
	ack, err := client.Ack(ctx)
	check(err)
	check(lease.Send(&pb.LeaseRequest{Request: &pb.LeaseRequest_Subscribe{Subscribe: &pb.Subscribe{
		Destinations: []string{destination},
		Consumer:     "go",
		Credit:       &pb.Credit{Messages: messages, Bytes: 1 << 20},
	}}}))
	next := map[string]int{}
	for seen := 0; seen < messages; {
		response, err := lease.Recv()
		check(err)
		request := &pb.AckRequest{}
		for _, run := range response.Runs {
			for _, m := range run.Messages {
				want := fmt.Sprint(next[run.Key]*queues + int(run.Key[4]-'0'))
				if string(m.Message.Payload) != want || m.Message.Headers["n"] != want || m.Attempt != 1 {
					log.Fatalf("queue %s: got %q, want %q, attempt %d", run.Key, m.Message.Payload, want, m.Attempt)
				}
				next[run.Key]++
				seen++
			}
			request.Settlements = append(request.Settlements, &pb.Settlement{
				Shard:        run.Shard,
				FencingToken: run.FencingToken,
				Sequence:     run.Messages[len(run.Messages)-1].Sequence,
				Outcome:      pb.Outcome_OUTCOME_ACK,
			})
		}
		if len(request.Settlements) == 0 {
			continue // a heartbeat
		}
		check(ack.Send(request))
		result, err := ack.Recv()
		check(err)
		if len(result.Errors) > 0 {
			log.Fatalf("ack: %v", result.Errors)
		}
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
