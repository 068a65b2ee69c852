package dev.polymesh.test;

import org.springframework.boot.SpringApplication;
import org.springframework.boot.autoconfigure.SpringBootApplication;
import org.springframework.cloud.client.loadbalancer.LoadBalanced;
import org.springframework.context.annotation.Bean;
import org.springframework.context.annotation.Configuration;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.PathVariable;
import org.springframework.web.bind.annotation.RestController;
import org.springframework.web.client.RestTemplate;

/** A program of an older system, for TestConsul: it is found by Consul, and finds others there. It knows nothing of a mesh. */
@SpringBootApplication
@RestController
public class Caller {

    private final RestTemplate byName;

    Caller(RestTemplate byName) {
        this.byName = byName;
    }

    public static void main(String[] args) {
        SpringApplication.run(Caller.class, args);
    }

    @GetMapping("/")
    String here() {
        return "the caller is here";
    }

    /** Asks a service by its name in Consul. */
    @GetMapping("/call/{service}")
    String call(@PathVariable String service) {
        return byName.getForObject("http://" + service + "/", String.class);
    }

    @Configuration
    static class Client {

        @Bean
        @LoadBalanced
        RestTemplate byName() {
            return new RestTemplate();
        }
    }
}
