// What tests/cluster/test_generated_clients.py runs with the client that openapi-generator makes for Go.
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	loom "github.com/GIT_USER_ID/GIT_REPO_ID"
)

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	ctx := context.Background()
	configuration := loom.NewConfiguration()
	configuration.Servers = loom.ServerConfigurations{{URL: os.Getenv("LOOM_URL")}}
	client := loom.NewAPIClient(configuration)

	provider := loom.NewCreateProvider()
	provider.SetId("local")
	provider.SetName("Local")
	provider.SetAttributes(map[string]interface{}{"region": "eu"})
	made, _, err := client.ProvidersAPI.CreateProvider(ctx).CreateProvider(*provider).Execute()
	check(err)
	if made.GetAttributes()["region"] != "eu" {
		log.Fatal("attributes")
	}

	name := "deploy/ü (1)"
	lock := loom.NewAcquireLock()
	lock.SetOwner("a")
	grant, _, err := client.LocksAPI.AcquireLock(ctx, name).AcquireLock(*lock).Execute()
	check(err)
	if grant.FencingToken <= 1<<32 {
		log.Fatal("token")
	}
	lock.SetOwner("b")
	_, answer, err := client.LocksAPI.AcquireLock(ctx, name).AcquireLock(*lock).Execute()
	problem, understood := err.(*loom.GenericOpenAPIError).Model().(loom.AcquireLock409)
	if answer.StatusCode != 409 || !understood || problem.LockHeldProblem == nil {
		log.Fatal("two holders: ", err)
	}
	if problem.LockHeldProblem.Holder.Get().Owner != "a" {
		log.Fatal("holder")
	}
	_, _, err = client.LocksAPI.RenewLock(ctx, name).RenewLock(*loom.NewRenewLock(grant.FencingToken)).Execute()
	check(err)
	_, err = client.LocksAPI.ReleaseLock(ctx, name).FencingToken(grant.FencingToken).Execute()
	check(err)

	project := loom.NewCreateProject("p", "r", "main")
	project.SetId("p")
	_, _, err = client.ProjectsAPI.CreateProject(ctx).CreateProject(*project).Execute()
	check(err)
	agent := loom.NewCreateAgent("coder", "p")
	agent.SetId("a")
	_, _, err = client.AgentsAPI.CreateAgent(ctx).CreateAgent(*agent).Execute()
	check(err)
	bead := loom.NewCreateBead("x", "p")
	bead.SetId("x")
	_, _, err = client.BeadsAPI.CreateBead(ctx).CreateBead(*bead).Execute()
	check(err)
	claim, _, err := client.BeadsAPI.ClaimNextBead(ctx).ClaimNext(*loom.NewClaimNext("a")).Execute()
	check(err)
	fmt.Println("claimed", claim.Bead.Id)
	_, _, err = client.BeadsAPI.CompleteBead(ctx, "x").Complete(*loom.NewComplete(claim.FencingToken)).Execute()
	check(err)

	page, _, err := client.EventsAPI.ReadEvents(ctx).After(0).Execute()
	check(err)
	if page.Events[len(page.Events)-1].Type != "bead.completed" {
		log.Fatal("events")
	}
}
