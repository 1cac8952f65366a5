// Command controllers runs the controllers of Kubernetes that the tests need, with the defaults of kube-controller-manager:
//
//	controllers KUBECONFIG
//
// kube-controller-manager itself would also bring those for nodes and volumes, and for them kubelet and scheduler.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	clientset "k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/scale"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	hpaconfig "k8s.io/kube-controller-manager/config/v1alpha1"
	"k8s.io/kubernetes/pkg/controller/deployment"
	"k8s.io/kubernetes/pkg/controller/disruption"
	"k8s.io/kubernetes/pkg/controller/job"
	"k8s.io/kubernetes/pkg/controller/namespace"
	"k8s.io/kubernetes/pkg/controller/podautoscaler"
	hpadefaults "k8s.io/kubernetes/pkg/controller/podautoscaler/config/v1alpha1"
	"k8s.io/kubernetes/pkg/controller/podautoscaler/metrics"
	"k8s.io/kubernetes/pkg/controller/replicaset"
	"k8s.io/kubernetes/pkg/controller/serviceaccount"
	resourcemetrics "k8s.io/metrics/pkg/client/clientset/versioned/typed/metrics/v1beta1"
	"k8s.io/metrics/pkg/client/custom_metrics"
	"k8s.io/metrics/pkg/client/external_metrics"
)

const (
	resync         = 12 * time.Hour
	namespaceSync  = 5 * time.Minute
	discoveryReset = 30 * time.Second
	workers        = 5
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: controllers KUBECONFIG")
		os.Exit(2)
	}
	if err := run(ctx, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, kubeconfig string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	config.QPS, config.Burst = 200, 400 // of all controllers together
	client, err := clientset.NewForConfig(config)
	if err != nil {
		return err
	}
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(client.Discovery()))
	resolver := scale.NewDiscoveryScaleKindResolver(client.Discovery())
	scales, err := scale.NewForConfig(config, mapper, dynamic.LegacyAPIPathResolverFunc, resolver)
	if err != nil {
		return err
	}
	metadata, err := metadata.NewForConfig(config)
	if err != nil {
		return err
	}
	resources, err := resourcemetrics.NewForConfig(config)
	if err != nil {
		return err
	}
	external, err := external_metrics.NewForConfig(config)
	if err != nil {
		return err
	}
	custom := custom_metrics.NewForConfig(config, mapper, custom_metrics.NewAvailableAPIsGetter(client.Discovery()))

	factory := informers.NewSharedInformerFactory(client, resync)
	apps, pods := factory.Apps().V1(), factory.Core().V1().Pods()
	namespaces := factory.Core().V1().Namespaces()

	deployments, err := deployment.NewDeploymentController(ctx, apps.Deployments(), apps.ReplicaSets(), pods, client)
	if err != nil {
		return err
	}
	jobs, err := job.NewController(ctx, client, pods, factory.Batch().V1().Jobs(), nil, nil)
	if err != nil {
		return err
	}
	accounts, err := serviceaccount.NewServiceAccountsController(klog.FromContext(ctx),
		factory.Core().V1().ServiceAccounts(), namespaces, client,
		serviceaccount.DefaultServiceAccountsControllerOptions())
	if err != nil {
		return err
	}
	replicaSets := replicaset.NewReplicaSetController(ctx, apps.ReplicaSets(), pods, client, replicaset.BurstReplicas)
	budgets := disruption.NewDisruptionController(ctx, pods, factory.Policy().V1().PodDisruptionBudgets(),
		factory.Core().V1().ReplicationControllers(), apps.ReplicaSets(), apps.Deployments(), apps.StatefulSets(),
		client, mapper, scales, client.Discovery())
	spaces := namespace.NewNamespaceController(ctx, client, metadata,
		client.Discovery().ServerPreferredNamespacedResources, namespaces, namespaceSync, core.FinalizerKubernetes)
	var defaults hpaconfig.HPAControllerConfiguration
	hpadefaults.RecommendedDefaultHPAControllerConfiguration(&defaults)
	autoscalers := podautoscaler.NewHorizontalController(ctx, client.CoreV1(), scales, client.AutoscalingV2(), mapper,
		metrics.NewRESTMetricsClient(resources, custom, external),
		factory.Autoscaling().V2().HorizontalPodAutoscalers(), pods,
		defaults.HorizontalPodAutoscalerSyncPeriod.Duration,
		defaults.HorizontalPodAutoscalerDownscaleStabilizationWindow.Duration,
		defaults.HorizontalPodAutoscalerTolerance,
		defaults.HorizontalPodAutoscalerCPUInitializationPeriod.Duration,
		defaults.HorizontalPodAutoscalerInitialReadinessDelay.Duration)

	factory.Start(ctx.Done())
	// Kinds that are defined later are found, too.
	go wait.Until(mapper.Reset, discoveryReset, ctx.Done())
	for _, controller := range []func(context.Context, int){
		deployments.Run, replicaSets.Run, jobs.Run, budgets.Run, spaces.Run, accounts.Run, autoscalers.Run,
	} {
		go controller(ctx, workers)
	}
	<-ctx.Done()
	return nil
}
